"""Protocols of the models that the scores use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Answerer(Protocol):
    """A visual question answering model, or a known truth that answers for one."""

    def answer(self, images: Tensor, question: str) -> list[str]:
        """One answer per image, in order; images [N, 3, H, W] in 0..1."""
        ...


class TextEmbedder(Protocol):
    """A text encoder, such as CLIP's."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """One embedding per text [N, D], of any length but zero."""
        ...


class ImageEmbedder(Protocol):
    """An image encoder, such as CLIP's or DINO's."""

    def embed_images(self, images: Tensor) -> Tensor:
        """One embedding per image [N, D]; images [N, 3, H, W] in 0..1."""
        ...
