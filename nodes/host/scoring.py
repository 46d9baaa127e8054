"""Scoring models in the host's model management: loaded while in use, unloaded afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.image_encoders.dino2 import Dinov2Model
from torch import Tensor, nn

from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.metrics.images import check_batch

# Images that an encoder takes at a time; the host can interrupt between them.
BATCH = 16


class ManagedModel(nn.Module):
    """A module around a model: the host sets attributes on modules that it manages, and a
    transformers model has a `device` that cannot be set.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@contextmanager
def load_model(model: nn.Module) -> Iterator[None]:
    """A model on the host's device for text encoders; it is unloaded when the context ends."""
    device = management.text_encoder_device()
    patcher = comfy.model_patcher.ModelPatcher(
        ManagedModel(model),
        load_device=device,
        offload_device=management.text_encoder_offload_device(),
    )
    try:
        # Whole: none of its layers are the host's, so no part could be left behind.
        management.load_models_gpu([patcher], force_full_load=True)
        yield
    finally:
        others = [m for m in management.current_loaded_models if m.model is not patcher]
        management.free_memory(1e30, device, keep_loaded=others)


def choose_half() -> torch.dtype:
    """The precision for models of billions of values: half, where the device is good at it.

    Encoders stay in float32: the last digits of their cosines count.
    """
    device = management.text_encoder_device()
    if management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if management.should_use_fp16(device) else torch.float32


def watch_progress(rounds: int = 1) -> Callable[[int, int, int], None]:
    """A callback (round, done, total) that moves the node's bar and heeds interruptions."""
    bar = comfy.utils.ProgressBar(1)

    def progress(number: int, done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(number * total + done, rounds * total)

    return progress


class WatchedAnswerer:
    """A VQA model under the node's bar, which runs over all questions."""

    def __init__(self, vqa: Any, questions: int) -> None:
        self.vqa, self.asked, self.progress = vqa, 0, watch_progress(questions)

    def answer(self, images: Tensor, question: str) -> list[str]:
        def progress(done: int, total: int) -> None:
            self.progress(self.asked, done, total)

        answers = self.vqa.answer(images, question, progress=progress)
        self.asked += 1
        return answers


class WatchedEncoder:
    """An encoder of the core, a few images at a time."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.progress = encoder, watch_progress()

    def embed_images(self, images: Tensor) -> Tensor:
        return self._rows(self.encoder.embed_images, images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self._rows(self.encoder.embed_texts, texts)

    def _rows(self, embed: Callable[[Any], Tensor], given: Tensor | Sequence[str]) -> Tensor:
        rows = []
        for start in range(0, len(given), BATCH):
            self.progress(0, start, len(given))
            rows.append(embed(given[start : start + BATCH]).cpu())
        self.progress(0, len(given), len(given))
        return torch.cat(rows)


class HostTextEncoder:
    """The graph's CLIP as a `TextEmbedder`: its pooled output."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """[N, P]; of a text longer than the encoder's 77 tokens, the first of them."""
        rows = []
        for text in texts:
            management.throw_exception_if_processing_interrupted()
            # Brackets in an answer are no weights.
            tokens = self.clip.tokenize(text, disable_weights=True)
            pooled = self.clip.encode_from_tokens(tokens, return_pooled=True)[1]
            if pooled is None:
                raise RetrievalError(
                    "The CLIP given has no pooled output to compare answers by; connect the CLIP "
                    "of an SD or SDXL checkpoint, or choose another answer encoder."
                )
            rows.append(pooled[:1].float().cpu())
        return torch.cat(rows)


class HostImageEncoder:
    """The graph's CLIP_VISION as an `ImageEmbedder`."""

    def __init__(self, clip_vision: Any) -> None:
        self.clip_vision = clip_vision

    @property
    def is_dino(self) -> bool:
        return isinstance(self.clip_vision.model, Dinov2Model)

    def embed_images(self, images: Tensor) -> Tensor:
        return self.clip_vision.encode_image(images.movedim(1, -1))["image_embeds"].float()


def convert_images(images: Any, what: str = "image", least: int = 1) -> Tensor:
    """Converts an IMAGE [N, H, W, C], or a list of several, to [N, 3, H, W] on the CPU.

    Raises:
        RetrievalError: fewer than `least`, not RGB, or of different sizes.
    """
    batches = [images] if isinstance(images, Tensor) else list(images)
    moved = [batch[..., :3].movedim(-1, 1).float().cpu() for batch in batches]
    return check_batch(moved[0] if len(moved) == 1 else [p for m in moved for p in m], what, least)
