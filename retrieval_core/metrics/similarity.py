"""CLIP-I, CLIP-T and DINO-I (§5.3): cosine similarity to references and to the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import RetrievalError
from .images import Images, check_batch
from .protocols import ImageEmbedder
from .statistics import Estimate, bootstrap


@dataclass(frozen=True, eq=False)
class ImageScore:
    """A score an image, in percent, [N] float64; `estimate` is their mean."""

    values: np.ndarray
    estimate: Estimate


def normalise(embeddings: Any) -> np.ndarray:
    """Embeddings [N, D] (tensor or array) at length one, float64.

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

    Raises:
        RetrievalError: no embedding on one side, different widths, or see `normalise`.
    """
    a, b = normalise(a), normalise(b)
    if not len(a) or not len(b):
        raise RetrievalError(
            f"There are {len(a)} images and {len(b)} to compare them with; give at least one each."
        )
    _check_widths(a, b)
    # The mean of the products is the product with the mean: no [N, M] matrix is needed.
    return 100 * (a @ b.mean(0))


def paired_similarity(a: Any, b: Any) -> np.ndarray:
    """Cosine similarity of a[i] with b[i], [N, D] each, in percent: [N]."""
    a, b = normalise(a), normalise(b)
    if len(a) != len(b):
        raise RetrievalError(
            f"There are {len(a)} images and {len(b)} texts; give one text for all, or one each."
        )
    _check_widths(a, b)
    return 100 * (a * b).sum(1)


def _check_widths(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[1] != b.shape[1]:
        raise RetrievalError(
            f"Embeddings of {a.shape[1]} and {b.shape[1]} values cannot be compared; use one model "
            "for both."
        )


def image_similarity(images: Images, references: Images, encoder: ImageEmbedder) -> ImageScore:
    """CLIP-I or DINO-I by the encoder: each image's mean cosine similarity to the references.

    Args:
        images: [N, 3, H, W]; references: [M, 3, h, w], of sizes of their own (a sequence may mix
            them).

    Raises:
        RetrievalError: no image or no reference, or images of different sizes.
    """
    embedded = encoder.embed_images(check_batch(images))
    return _scored(similarity(embedded, embed_images(references, encoder)))


def embed_images(references: Images, encoder: ImageEmbedder) -> np.ndarray:
    """Embeddings [M, D] of references, of length one.

    Raises:
        RetrievalError: no reference.
    """
    if not len(references):
        raise RetrievalError("There are no references to compare with; give at least one.")
    theirs = [encoder.embed_images(check_batch([r], "reference")) for r in references]
    return np.concatenate([normalise(t) for t in theirs])


def text_similarity(images: Images, prompts: str | Sequence[str], encoder: Any) -> ImageScore:
    """CLIP-T: cosine similarity of each image with its prompt (one for all, or one each).

    torchmetrics' CLIPScore is the mean of these values, with a mean below zero raised to zero.

    Args:
        encoder: both `ImageEmbedder` and `TextEmbedder`, into one space.

    Raises:
        RetrievalError: no image, an empty prompt, or another number of prompts than of images.
    """
    images = check_batch(images)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(text.strip() for text in texts):
        raise RetrievalError(
            "The prompt to compare with is empty; give the text that the images should follow."
        )
    if len(texts) == 1:
        texts = texts * len(images)
    if len(texts) != len(images):
        raise RetrievalError(
            f"There are {len(images)} images and {len(texts)} prompts; give one prompt for all, or "
            "one each."
        )
    distinct = list(dict.fromkeys(texts))
    embedded = normalise(encoder.embed_texts(distinct))[[distinct.index(t) for t in texts]]
    return _scored(paired_similarity(encoder.embed_images(images), embedded))


def _scored(values: np.ndarray) -> ImageScore:
    return ImageScore(values, bootstrap(values))
