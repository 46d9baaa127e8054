"""What the scores ask of a model; any object with the method will do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Answerer(Protocol):
    """A visual question answering model, or whatever knows the answers."""

    def answer(self, images: Tensor, question: str) -> list[str]:
        """One answer an image, in order; images [N, 3, H, W] in 0..1."""
        ...


@runtime_checkable
class TextEmbedder(Protocol):
    """A text encoder, such as CLIP's."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """One embedding a text [N, D], of any length but zero."""
        ...


@runtime_checkable
class ImageEmbedder(Protocol):
    """An image encoder, such as CLIP's or DINO's."""

    def embed_images(self, images: Tensor) -> Tensor:
        """One embedding an image [N, D]; images [N, 3, H, W] in 0..1."""
        ...
