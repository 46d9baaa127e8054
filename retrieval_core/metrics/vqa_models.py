"""VQA models in the format of transformers: InstructBLIP, BLIP, and chat models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RetrievalError
from ..hub import Progress
from ..sheets import convert_to_pil
from .pretrained import import_transformers, load_model, load_part, move_inputs, read_config

# CLIP's text encoder reads 77 tokens, of which two mark the start and the end.
MAX_NEW_TOKENS = 75
BATCH = 4
# Kinds whose processor takes the plain question; all others take it in a chat template.
PLAIN_KINDS = {
    "blip": "BlipForQuestionAnswering",
    "instructblip": "InstructBlipForConditionalGeneration",
}


class VQAModel:
    """An `Answerer`: greedy decoding, so equal images get equal answers.

    Attributes:
        model: transformers' model. Whoever owns it may move it; inputs follow its parameters.
        max_new_tokens: the longest answer. batch_size: images per call of the model.
    """

    def __init__(
        self, model: nn.Module, processor: Any, chat: bool, max_new_tokens: int, batch_size: int
    ) -> None:
        self.model, self.processor, self.chat = model, processor, chat
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    @torch.no_grad()
    def answer(self, images: Tensor, question: str, progress: Progress | None = None) -> list[str]:
        """One answer per image, without the question; images [N, 3, H, W] in 0..1.

        Args:
            progress: called with (images done, images in all) before the first batch and after
                each; may raise to interrupt.
        """
        answers: list[str] = []
        for some in images.split(self.batch_size):
            if progress is not None:
                progress(len(answers), len(images))
            inputs = move_inputs(self._process(some, question), self.model)
            tokens = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=self.max_new_tokens,
            )
            prompt = inputs["input_ids"]
            # Decoders repeat the prompt before the answer, encoder-decoders do not.
            if torch.equal(tokens[:, : prompt.shape[1]], prompt):
                tokens = tokens[:, prompt.shape[1] :]
            texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            answers += [text.strip() for text in texts]
        if progress is not None:
            progress(len(answers), len(images))
        return answers

    def _process(self, images: Tensor, question: str) -> Any:
        """The processor's tensors of images and question."""
        pils = [convert_to_pil(image) for image in images]
        if not self.chat:
            questions = [question] * len(pils)
            return self.processor(images=pils, text=questions, return_tensors="pt")
        # Images of one size and one question give prompts of one length: nothing is padded.
        contents = [
            [{"type": "image", "image": pil}, {"type": "text", "text": question}] for pil in pils
        ]
        return self.processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in contents],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )


def load_vqa(
    folder: Path,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> VQAModel:
    """A VQA model from a folder in the format of transformers.

    InstructBLIP (the paper's, §5.5), BLIP VQA, and every image-text-to-text model with a chat
    template (LLaVA, Qwen2-VL, Idefics3, SmolVLM, ...).

    Args:
        max_new_tokens, batch_size: see `VQAModel`.
        device: of the model, the CPU by default.
        dtype: by default bfloat16 on a GPU, where that is fast and saves half of the memory of
            billions of parameters, and float32 on the CPU.

    Raises:
        RetrievalError: a kind that answers no questions, a chat model without a template, or see
            `pretrained`.
    """
    kind = _find_class(folder, read_config(folder))
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
    if dtype is None and device == "cuda":
        dtype = torch.bfloat16
    model = load_model(kind, folder, device, dtype)
    return VQAModel(model, processor, chat, max_new_tokens, batch_size)


def _find_class(folder: Path, config: dict[str, Any]) -> str:
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
