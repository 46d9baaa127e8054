"""VQA models in the format of transformers as `Answerer`: InstructBLIP, BLIP, and chat models."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import RetrievalError
from .pretrained import (
    import_transformers,
    load_model,
    load_part,
    pictures,
    read_config,
    to_model,
)

# What CLIP's text encoder reads of an answer: 77 tokens, two of them its own.
MAX_NEW_TOKENS = 75
BATCH = 4
# Kinds whose processor takes the question as it is; all others are asked through a chat template.
PLAIN_KINDS = {
    "blip": "BlipForQuestionAnswering",
    "instructblip": "InstructBlipForConditionalGeneration",
}

Progress = Callable[[int, int], None]


class VQAModel:
    """An `Answerer`: greedy decoding, so equal images get equal answers.

    Attributes:
        model: transformers' model. Whoever owns it may move it; inputs follow its parameters.
        max_new_tokens: the longest answer. batch_size: images that are asked at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        chat: bool,
        max_new_tokens: int = MAX_NEW_TOKENS,
        batch_size: int = BATCH,
    ) -> None:
        self.model, self.processor = model, processor
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self._put = _as_chat if chat else _as_it_is

    @torch.no_grad()
    def answer(self, images: Tensor, question: str, progress: Progress | None = None) -> list[str]:
        """One answer an image, without the question; images [N, 3, H, W] in 0..1.

        Args:
            progress: called with (images done, images in all) before the first batch and after
                each; may raise to interrupt.
        """
        answers: list[str] = []
        for some in images.split(self.batch_size):
            if progress is not None:
                progress(len(answers), len(images))
            inputs = to_model(self._put(self.processor, pictures(some), question), self.model)
            tokens = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=self.max_new_tokens,
            )
            tokens = _without_prompt(tokens, inputs["input_ids"])
            texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            answers += [text.strip() for text in texts]
        if progress is not None:
            progress(len(answers), len(images))
        return answers


def load_vqa(
    folder: str | PathLike[str],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> VQAModel:
    """A VQA model from a folder in the format of transformers.

    InstructBLIP (the paper's, §5.5), BLIP VQA, and every image-text-to-text model with a chat
    template (LLaVA, Qwen2-VL, Idefics3, SmolVLM, ...).

    Args:
        max_new_tokens: the longest answer. batch_size: images that are asked at a time.
        device: where the model goes (the CPU by default). dtype: float32 by default.

    Raises:
        RetrievalError: a kind that answers no questions, a chat model without template, or see
            `pretrained`.
    """
    folder = Path(folder)
    kind = _model_class(folder, read_config(folder))
    processor = load_part("AutoProcessor", folder)
    chat = kind not in PLAIN_KINDS.values()
    if chat and not getattr(processor, "chat_template", None):
        raise RetrievalError(
            f"The model in '{folder}' has no chat template to put a question in; use its variant "
            "that is tuned for chat or instructions."
        )
    if kind == PLAIN_KINDS["instructblip"] and not getattr(processor, "num_query_tokens", None):
        raise RetrievalError(
            f"The processor in '{folder}' does not say its num_query_tokens, as InstructBLIP's "
            "must; fetch the model's present files."
        )
    model = load_model(kind, folder, device, dtype)
    return VQAModel(model, processor, chat, max_new_tokens, batch_size)


def _model_class(folder: Path, config: dict[str, Any]) -> str:
    """The name of transformers' class for a model that answers questions about images."""
    kind, architectures = config["model_type"], config.get("architectures") or []
    import_transformers()
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CHAT_KINDS,
    )

    if kind in PLAIN_KINDS and PLAIN_KINDS[kind] in architectures:
        return PLAIN_KINDS[kind]
    if kind in PLAIN_KINDS or kind not in CHAT_KINDS:
        raise RetrievalError(
            f"The model in '{folder}' is {', '.join(architectures) or kind} and answers no "
            "questions about images; use InstructBLIP, BLIP VQA, or a chat model such as LLaVA."
        )
    return "AutoModelForImageTextToText"


def _as_it_is(processor: Any, images: list[Image.Image], question: str) -> Any:
    return processor(images=images, text=[question] * len(images), return_tensors="pt")


def _as_chat(processor: Any, images: list[Image.Image], question: str) -> Any:
    # Images of one size and one question give prompts of one length: nothing is padded.
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": image}, {"type": "text", "text": question}],
            }
        ]
        for image in images
    ]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def _without_prompt(tokens: Tensor, prompt: Tensor) -> Tensor:
    """Decoders give the prompt back before the answer; encoder-decoders do not."""
    length = prompt.shape[1]
    given_back = tokens.shape[1] >= length and torch.equal(tokens[:, :length], prompt)
    return tokens[:, length:] if given_back else tokens
