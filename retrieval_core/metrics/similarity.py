"""CLIP-I, CLIP-T and DINO-I (§5.3): cosine similarity to references and to the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import RetrievalError
from .protocols import ImageEmbedder
from .statistics import Estimate, estimate_mean


@dataclass(frozen=True, eq=False)
class ImageScore:
    """One score per image, in percent: `values` [N] float64."""

    values: np.ndarray

    @property
    def estimate(self) -> Estimate:
        return estimate_mean(self.values)


def normalise(embeddings: Any) -> np.ndarray:
    """Embeddings [N, D] (tensor or array) scaled to length one, float64.

    Raises:
        RetrievalError: another shape, or an embedding that is zero or not finite.
    """
    if hasattr(embeddings, "detach"):
        embeddings = embeddings.detach().cpu().double().numpy()
    embeddings = np.asarray(embeddings, np.float64)
    if embeddings.ndim != 2:
        raise RetrievalError(
            f"Embeddings of shape {embeddings.shape} cannot be compared; give one vector each, "
            "[number, width]."
        )
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    wrong = np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))
    if wrong.size:
        raise RetrievalError(
            f"Embedding {wrong[0] + 1} of {len(embeddings)} has length {lengths[wrong[0], 0]:g}, "
            "so it has no direction to compare; use another encoder, or full precision."
        )
    return embeddings / lengths


def similarity(a: Any, b: Any) -> np.ndarray:
    """For each of a [N, D], the mean cosine similarity to all of b [M, D], in percent: [N].

    Not clipped: opposite directions are -100.
    """
    # The mean of the products is the product with the mean: no [N, M] matrix is needed.
    return 100 * (normalise(a) @ normalise(b).mean(0))


def image_similarity(
    images: Tensor, references: Sequence[Tensor] | Tensor, encoder: ImageEmbedder
) -> ImageScore:
    """CLIP-I or DINO-I by the encoder: each image's mean cosine similarity to the references.

    Args:
        images: [N, 3, H, W]. references: one or more [3, h, w], which may differ in size.
    """
    embedded = encoder.embed_images(images)
    return ImageScore(similarity(embedded, embed_references(references, encoder)))


def embed_references(references: Sequence[Tensor] | Tensor, encoder: ImageEmbedder) -> np.ndarray:
    """Embeddings [M, D] at length one of references [3, h, w], encoded one by one."""
    return np.concatenate([normalise(encoder.embed_images(r[None])) for r in references])


def text_similarity(images: Tensor, prompts: str | Sequence[str], encoder: Any) -> ImageScore:
    """CLIP-T: cosine similarity of each image with its prompt (one for all, or one each).

    torchmetrics' CLIPScore is the mean of these values, with a mean below zero raised to zero.

    Args:
        images: [N, 3, H, W].
        encoder: both `ImageEmbedder` and `TextEmbedder`, into one space.

    Raises:
        RetrievalError: another number of prompts than of images.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if len(texts) == 1:
        texts = texts * len(images)
    if len(texts) != len(images):
        raise RetrievalError(
            f"There are {len(images)} images and {len(texts)} prompts; give one prompt for all, or "
            "one each."
        )
    distinct = list(dict.fromkeys(texts))
    embedded = normalise(encoder.embed_texts(distinct))[[distinct.index(t) for t in texts]]
    return ImageScore(100 * (normalise(encoder.embed_images(images)) * embedded).sum(1))
