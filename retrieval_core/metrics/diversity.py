"""Diversity of embeddings (§5.5): mean pairwise cosine distance, plain and weighted by similarity.

For vectors u of length one, 1 - u_i . u_j = |u_i - u_j|^2 / 2, and the sum of the weighted squared
distances over all pairs follows from sums over the vectors. So neither the score nor its bootstrap
makes a pair: time and memory grow with N, not with N^2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import RetrievalError
from .similarity import normalise
from .statistics import CHUNK, RESAMPLES, Estimate, resampling_counts

BLOCK = 1024
# Products of equal unit vectors are off one by rounding; nearer than this is the same direction.
SAME = 1e-12


@dataclass(frozen=True)
class Pair:
    """Two images by position, first < second, and their cosine distance in percent."""

    first: int
    second: int
    distance: float


def diversity(embeddings: Any, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean pairwise cosine distance of embeddings [N, D], in percent: the score of Table 4.

    Exactly 0 where all embeddings are equal, and the same to the last bit in any order. 0 to 100
    for embeddings in one half space, such as CLIP's, and at most 100 N / (N - 1) for any.

    The standard error resamples images with replacement and leaves out pairs of one image with
    itself, whose distance 0 would bias it; nan below three images.

    Raises:
        RetrievalError: fewer than two embeddings, or see `similarity.normalise`.
    """
    return _mean_distance(embeddings, None, resamples, seed)


def weighted_diversity(
    embeddings: Any,
    similarity: Sequence[float] | np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Diversity in which a pair counts by how similar its images are to what was asked for.

    The mean over all pairs of sqrt(s_i s_j) times their cosine distance, in percent, where s is
    `similarity` / 100 kept within 0..1. With one s for all it is s times `diversity`.

    §5.5 of the paper (v1) gives the idea and no formula: "Note that a better model by CLIP scores
    in Table 3 does not necessarily have higher average VQA scores, since a less robust model can
    generate more messy images given the same conditioning, resulting in larger distances. [...]
    For instance, we can propose updated VQA scores which are re-weighted by existing similarity
    scores, to better measure the overall quality and diversity of the generation." This is that
    suggestion, with a formula of our own: the weights are not divided out, because a model whose
    images are all messy must lose by it.

    It is NOT claimed to be the authors' own "Similarity Weighted Diversity". Of it, only what their
    later abstract says could be consulted: "we introduce a novel class of metrics named Similarity
    Weighted Diversity (SWD), to measure the overlooked diversity and better evaluate the alignment
    between similarity and diversity" (arXiv 2312.02521v3; v2 has it, too); not the formula.

    Args:
        similarity: [N] in percent: `ImageScore.values` of CLIP-I, of CLIP-T, or the attribute
            match of the paper-doll world.

    Raises:
        RetrievalError: another number of similarities, one that is not finite, or see `diversity`.
    """
    weights = np.asarray(similarity, np.float64).reshape(-1) / 100
    if not np.isfinite(weights).all():
        raise RetrievalError(
            "A similarity to weight by is not finite; score those images again, or leave them out."
        )
    return _mean_distance(embeddings, np.sqrt(weights.clip(0, 1)), resamples, seed)


def _mean_distance(
    embeddings: Any, weights: np.ndarray | None, resamples: int, seed: int
) -> Estimate:
    """100 times the mean over pairs i < j of w_i w_j (1 - cos_ij), and its bootstrap error."""
    vectors = _two_or_more(embeddings)
    count = len(vectors)
    if weights is None:
        weights = np.ones(count)
    if len(weights) != count:
        raise RetrievalError(
            f"There are {count} images and {len(weights)} similarities to weight them by; give one "
            "an image."
        )
    # One order of the rows whatever order they came in: sums of floats depend on it.
    order = _canonical_order(np.column_stack([vectors, weights]))
    vectors, weights = vectors[order], weights[order]
    # Distances do not change, and equal vectors become exact zeros.
    vectors -= vectors[0].copy()
    squares = (vectors**2).sum(1)

    def means(drawn: np.ndarray) -> np.ndarray:
        """The score of each row of counts [R, N]; nan where a row holds one image only."""
        weighted = drawn * weights
        sums = weighted.sum(1) * (weighted @ squares) - ((weighted @ vectors) ** 2).sum(1)
        pairs = drawn.sum(1) ** 2 - (drawn**2).sum(1)
        with np.errstate(invalid="ignore"):
            return 100 * sums.clip(0) / np.where(pairs > 0, pairs, np.nan)

    mean = float(means(np.ones((1, count)))[0])
    if count < 3:  # every draw of two that is a pair is the same pair
        return Estimate(mean, float("nan"), count)
    found = []
    for start in range(0, resamples, CHUNK):
        drawn = resampling_counts(count, min(CHUNK, resamples - start), seed + start)
        found.append(means(drawn))
    return Estimate(mean, float(np.nanstd(np.concatenate(found), ddof=1)), count)


def _two_or_more(embeddings: Any) -> np.ndarray:
    vectors = normalise(embeddings)
    if len(vectors) < 2:
        raise RetrievalError(
            f"Diversity needs at least two images and there is {len(vectors)}; give a larger batch."
        )
    return vectors


def _canonical_order(rows: np.ndarray) -> np.ndarray:
    rows = np.ascontiguousarray(rows)
    return rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0].argsort()


def _distance_blocks(vectors: np.ndarray, block: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, distances [block, N] in 0..2) of unit vectors."""
    for start in range(0, len(vectors), block):
        distances = 1 - vectors[start : start + block] @ vectors.T
        distances[distances < SAME] = 0
        yield start, distances


def compute_distance_matrix(embeddings: Any) -> np.ndarray:
    """All pairwise cosine distances in percent, [N, N], to be looked at.

    Raises:
        RetrievalError: fewer than two embeddings.
    """
    vectors = _two_or_more(embeddings)
    matrix = 100 * next(_distance_blocks(vectors, len(vectors)))[1]
    np.fill_diagonal(matrix, 0)
    return matrix


def find_extreme_pairs(embeddings: Any, block: int = BLOCK) -> tuple[Pair, Pair]:
    """The most and the least alike pair; of equal ones the first. `block` rows are held at a time.

    Raises:
        RetrievalError: fewer than two embeddings.
    """
    vectors = _two_or_more(embeddings)
    most = least = None
    for start, distances in _distance_blocks(vectors, block):
        rows = np.arange(start, start + len(distances))
        later = np.arange(len(vectors)) > rows[:, None]
        if not later.any():
            continue
        near, far = np.where(later, distances, np.inf), np.where(later, distances, -np.inf)
        i, j = np.unravel_index(near.argmin(), near.shape)
        if most is None or near[i, j] * 100 < most.distance:
            most = Pair(int(start + i), int(j), float(100 * near[i, j]))
        i, j = np.unravel_index(far.argmax(), far.shape)
        if least is None or far[i, j] * 100 > least.distance:
            least = Pair(int(start + i), int(j), float(100 * far[i, j]))
    assert most is not None and least is not None
    return most, least
