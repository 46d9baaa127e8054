"""Diversity of embeddings (§5.5): mean pairwise cosine distance, plain and weighted by similarity.

For vectors u of length one, 1 - u_i . u_j = |u_i - u_j|^2 / 2, and the sum of the weighted squared
distances over all pairs follows from sums over the vectors. So neither the score nor its bootstrap
makes a pair: time and memory grow with N, not with N^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .similarity import normalise
from .statistics import Estimate

# Draws of the bootstrap, and those computed at a time: 10,000 images then need 5 MB.
RESAMPLES, CHUNK = 1000, 64
# Rows of the distance matrix in memory at a time.
BLOCK = 1024
# Rounding takes products of equal unit vectors away from 1; a smaller distance counts as 0.
SAME = 1e-12


@dataclass(frozen=True)
class Pair:
    """Two images by position, first < second, and their cosine distance in percent."""

    first: int
    second: int
    distance: float


def diversity(embeddings: Any) -> Estimate:
    """Mean pairwise cosine distance of N >= 2 embeddings [N, D], in percent: the score of Table 4.

    Exactly 0 where all embeddings are equal, and the same to the last bit in any order. 0 to 100
    for embeddings in one half space, such as CLIP's, and at most 100 N / (N - 1) for any.

    The standard error is a bootstrap (Efron, 1979): it resamples images with replacement and
    leaves out pairs of one image with itself, whose distance 0 would bias it; nan for two images.

    Raises:
        RetrievalError: see `similarity.normalise`.
    """
    vectors = normalise(embeddings)
    return _estimate_distance(vectors, np.ones(len(vectors)))


def weighted_diversity(embeddings: Any, similarity: Sequence[float] | np.ndarray) -> Estimate:
    """Diversity in which a pair counts by how similar its images are to what was asked for.

    The mean over all pairs of sqrt(s_i s_j) times their cosine distance, in percent, where s is
    `similarity` / 100 clipped to 0..1. With one s for all it is s times `diversity`.

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
        similarity: [N] finite values in percent: `ImageScore.values` of CLIP-I, of CLIP-T, or the
            attribute match of the paper-doll world.
    """
    weights = np.asarray(similarity, np.float64) / 100
    return _estimate_distance(normalise(embeddings), np.sqrt(weights.clip(0, 1)))


def _estimate_distance(vectors: np.ndarray, weights: np.ndarray) -> Estimate:
    """100 times the mean over pairs i < j of w_i w_j (1 - cos_ij), and its bootstrap error."""
    count = len(vectors)
    # The sums below depend on the order of the rows in their last bits.
    order = _find_canonical_order(np.column_stack([vectors, weights]))
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
    resampled = []
    for start in range(0, RESAMPLES, CHUNK):
        rng, rows = np.random.default_rng(start), min(CHUNK, RESAMPLES - start)
        drawn = rng.multinomial(count, np.full(count, 1 / count), rows).astype(np.float64)
        resampled.append(means(drawn))
    return Estimate(mean, float(np.nanstd(np.concatenate(resampled), ddof=1)), count)


def _find_canonical_order(rows: np.ndarray) -> np.ndarray:
    rows = np.ascontiguousarray(rows)
    return rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0].argsort()


def compute_distance_matrix(embeddings: Any) -> np.ndarray:
    """All pairwise cosine distances of embeddings [N, D] in percent, [N, N]."""
    vectors = normalise(embeddings)
    matrix = 100 * _compute_distances(vectors, vectors)
    np.fill_diagonal(matrix, 0)
    return matrix


def find_extreme_pairs(embeddings: Any) -> tuple[Pair, Pair]:
    """The most and the least alike pair of N >= 2 embeddings; of equal distances the first pair."""
    vectors = normalise(embeddings)
    found = []
    for start in range(0, len(vectors) - 1, BLOCK):
        distances = _compute_distances(vectors[start : start + BLOCK], vectors)
        distances[np.tri(*distances.shape, start, dtype=bool)] = np.nan  # pairs have i < j
        for choose in (np.nanargmin, np.nanargmax):
            i, j = np.unravel_index(choose(distances), distances.shape)
            found.append(Pair(int(start + i), int(j), float(100 * distances[i, j])))
    most = min(found, key=lambda pair: pair.distance)
    return most, max(found, key=lambda pair: pair.distance)


def _compute_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine distances [M, N] in 0..2 of unit vectors [M, D] and [N, D]."""
    distances = 1 - a @ b.T
    distances[distances < SAME] = 0
    return distances
