"""CLIP and DINO models in the format of transformers as `ImageEmbedder` and `TextEmbedder`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RetrievalError
from ..sheets import convert_to_pil
from .pretrained import load_model, load_part, move_inputs, read_config

# Images or texts that are encoded at a time.
BATCH = 16
# model_type -> options of its class. DINO's ViT has no pooling layer; its CLS token is the feature.
DINO_KINDS: dict[str, dict[str, Any]] = {
    "vit": {"add_pooling_layer": False},
    "dinov2": {},
    "dinov2_with_registers": {},
}


class DinoEncoder:
    """The CLS token of DINO or DINOv2 after its last norm: an `ImageEmbedder`.

    Attributes:
        model: transformers' ViTModel or Dinov2Model. Whoever owns it may move it; inputs follow
            its parameters.
    """

    def __init__(self, model: nn.Module, image_processor: Any) -> None:
        self.model, self._image_processor = model, image_processor

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Features [N, D] float32 of images [N, 3, H, W] in 0..1, not normalised, on the CPU."""
        rows = []
        for some in images.split(BATCH):
            pils = [convert_to_pil(image) for image in some]
            inputs = self._image_processor(images=pils, return_tensors="pt")
            rows.append(self._compute_features(move_inputs(inputs, self.model)).float().cpu())
        return torch.cat(rows)

    def _compute_features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs).last_hidden_state[:, 0]


class ClipEncoder(DinoEncoder):
    """Projected features of CLIP: an `ImageEmbedder` and a `TextEmbedder` into one space.

    Attributes:
        model: transformers' CLIPModel.
    """

    def __init__(self, model: nn.Module, image_processor: Any, tokenizer: Any) -> None:
        super().__init__(model, image_processor)
        self._tokenizer = tokenizer

    def _compute_features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(**inputs).pooler_output)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Features [N, D] float32 of texts, cut off where CLIP's context (77 tokens) ends."""
        rows = []
        for start in range(0, len(texts), BATCH):
            inputs = self._tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            pooled = self.model.text_model(**move_inputs(inputs, self.model)).pooler_output
            rows.append(self.model.text_projection(pooled).float().cpu())
        return torch.cat(rows)


def load_clip(folder: Path, device: torch.device | str | None = None) -> ClipEncoder:
    """CLIP from a folder in the format of transformers, such as openai/clip-vit-large-patch14.

    Args:
        device: of the model, the CPU by default.

    Raises:
        RetrievalError: another kind of model, or see `pretrained`.
    """
    wanted = "CLIP with its image and text encoder"
    _check_kind(folder, ("clip",), wanted, "openai/clip-vit-large-patch14")
    tokenizer = load_part("AutoTokenizer", folder)
    processor = _load_image_processor(folder)
    return ClipEncoder(load_model("CLIPModel", folder, device), processor, tokenizer)


def load_dino(folder: Path, device: torch.device | str | None = None) -> DinoEncoder:
    """DINO ViT-S/16 (facebook/dino-vits16, the usual DINO-I) or DINOv2, as `load_clip`."""
    wanted = f"DINO ({', '.join(DINO_KINDS)})"
    kind = _check_kind(folder, DINO_KINDS, wanted, "facebook/dinov2-small")
    processor = _load_image_processor(folder)
    return DinoEncoder(load_model("AutoModel", folder, device, **DINO_KINDS[kind]), processor)


def _check_kind(folder: Path, kinds: Collection[str], wanted: str, example: str) -> str:
    """The model's kind; RetrievalError if it is none of `kinds`."""
    kind = read_config(folder)["model_type"]
    if kind not in kinds:
        raise RetrievalError(
            f"The model in '{folder}' is of the kind '{kind}' and not {wanted}; use one such as "
            f"{example}."
        )
    return kind


def _load_image_processor(folder: Path) -> Any:
    # The fast ones need torchvision and resize otherwise: scores would depend on the installation.
    return load_part("AutoImageProcessor", folder, use_fast=False)
