"""Scoring models in the host's model management: loaded while in use, unloaded afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import torch
from torch import Tensor, nn

from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.metrics.vqa_models import VQAModel
from .loading import make_progress

# Images that an encoder takes at a time; the host can interrupt between them.
BATCH = 16


@contextmanager
def load_model(model: nn.Module) -> Iterator[None]:
    """A model on the host's device for text encoders; it is unloaded when the context ends."""
    device = management.text_encoder_device()
    patcher = comfy.model_patcher.ModelPatcher(
        # The host sets `device` on what it manages, which a transformers model refuses.
        nn.Sequential(model),
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


class WatchedAnswerer:
    """A VQA model under the node's bar, which runs over all questions."""

    def __init__(self, vqa: VQAModel, questions: int) -> None:
        self.vqa, self.questions, self.asked, self.progress = vqa, questions, 0, make_progress()

    def answer(self, images: Tensor, question: str) -> list[str]:
        before, total = self.asked * len(images), self.questions * len(images)
        self.asked += 1
        return self.vqa.answer(
            images, question, lambda done, _: self.progress(before + done, total)
        )


class WatchedEncoder:
    """An encoder of the core under the node's bar, a few images or texts at a time."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.progress = encoder, make_progress()

    def embed_images(self, images: Tensor) -> Tensor:
        return self._embed(self.encoder.embed_images, images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self._embed(self.encoder.embed_texts, texts)

    def _embed(self, embed: Callable[[Any], Tensor], given: Tensor | Sequence[str]) -> Tensor:
        rows = []
        for start in range(0, len(given), BATCH):
            self.progress(start, len(given))
            rows.append(embed(given[start : start + BATCH]).cpu())
        self.progress(len(given), len(given))
        return torch.cat(rows)


@contextmanager
def load_encoder(load: Callable[[Path], Any], folder: Path) -> Iterator[WatchedEncoder]:
    """The encoder that `load` reads from a folder, in `load_model`'s context."""
    encoder = load(folder)
    with load_model(encoder.model):
        yield WatchedEncoder(encoder)


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

    def embed_images(self, images: Tensor) -> Tensor:
        return self.clip_vision.encode_image(images.movedim(1, -1))["image_embeds"].float()


def convert_images(images: Tensor, what: str = "image", least: int = 1) -> Tensor:
    """Converts an IMAGE [N, H, W, C] to [N, 3, H, W] on the CPU.

    Raises:
        RetrievalError: fewer than `least`, or not RGB; `what` names them.
    """
    if len(images) < least:
        raise RetrievalError(
            f"The number of {what}s is {len(images)} and this score needs at least {least}; give a "
            "larger batch."
        )
    if images.shape[-1] < 3:
        raise RetrievalError(
            f"The {what}s have shape {tuple(images.shape)}; give RGB images "
            "[number, height, width, 3]."
        )
    return images[..., :3].movedim(-1, 1).float().cpu()
