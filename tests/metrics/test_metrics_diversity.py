"""Diversity against a plain formulation over pairs, its invariances, its errors and its memory."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import sentence

from retrieval_core.metrics.diversity import (
    compute_distance_matrix,
    diversity,
    find_extreme_pairs,
    weighted_diversity,
)
from retrieval_core.metrics.statistics import Estimate, estimate_mean


def distance(u, v) -> float:
    """Cosine distance in percent, from sums of Python floats."""
    product = math.fsum(a * b for a, b in zip(u, v))
    lengths = math.sqrt(math.fsum(a * a for a in u)) * math.sqrt(math.fsum(b * b for b in v))
    return 100 * (1 - product / lengths)


def over_pairs(vectors, weights=None) -> float:
    weights = [1.0] * len(vectors) if weights is None else weights
    pairs = list(itertools.combinations(range(len(vectors)), 2))
    total = math.fsum(
        math.sqrt(weights[i] * weights[j]) * distance(vectors[i], vectors[j]) for i, j in pairs
    )
    return total / len(pairs)


def embeddings(count: int, width: int = 7, seed: int = 0, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, (count, width))


@pytest.mark.parametrize("count", [2, 3, 17])
@pytest.mark.parametrize("mean", [0.0, 2.0, 300.0])
def test_the_score_is_the_mean_over_all_pairs(count, mean):
    vectors = embeddings(count, seed=count, mean=mean)
    assert diversity(vectors).mean == pytest.approx(over_pairs(vectors.tolist()), abs=1e-6)
    single = torch.tensor(vectors, dtype=torch.float32)
    expected = over_pairs(single.double().tolist())
    assert diversity(single).mean == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("count", [2, 3, 17])
def test_the_weighted_score_is_the_weighted_mean_over_all_pairs(count):
    vectors = embeddings(count, seed=count, mean=1.0)
    similarity = np.random.default_rng(count).uniform(-20, 120, count)
    weights = [min(1, max(0, s / 100)) for s in similarity]
    found = weighted_diversity(vectors, similarity).mean
    assert found == pytest.approx(over_pairs(vectors.tolist(), weights), abs=1e-6)
    # One similarity for all scales the plain score; full similarity is the plain score.
    plain = diversity(vectors).mean
    assert weighted_diversity(vectors, [30] * count).mean == pytest.approx(0.3 * plain, abs=1e-9)
    assert weighted_diversity(vectors, [100] * count).mean == pytest.approx(plain, abs=1e-9)


def test_lengths_do_not_count():
    vectors = embeddings(6)
    scaled = vectors * np.linspace(0.01, 50, 6)[:, None]
    assert diversity(scaled).mean == pytest.approx(diversity(vectors).mean, abs=1e-9)


def test_known_values():
    assert diversity(np.eye(5)).mean == pytest.approx(100)
    assert diversity([[1.0, 0.0], [-1.0, 0.0]]).mean == pytest.approx(200)
    # Half of all pairs of 2 + 2 vectors in two directions at 60 degrees: 4 of 6 pairs differ by 50.
    two = [[1, 0], [1, 0], [0.5, math.sqrt(0.75)], [0.5, math.sqrt(0.75)]]
    assert diversity(two).mean == pytest.approx(100 / 3)


@given(st.integers(2, 40), st.integers(1, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_equal_answers_score_exactly_nothing(count, width, seed):
    row = np.random.default_rng(seed).normal(size=(1, width)).astype(np.float32)
    same = row.repeat(count, 0)
    assert diversity(same).mean == 0
    assert weighted_diversity(same, [50] * count).mean == 0
    assert all(pair.distance == 0 for pair in find_extreme_pairs(same))


@given(st.permutations(range(12)))
@settings(max_examples=30, deadline=None)
def test_the_order_changes_no_bit(order):
    vectors = embeddings(12, mean=0.5)
    vectors[3] = vectors[7]
    similarity = np.linspace(10, 90, 12)
    assert diversity(vectors[order]) == diversity(vectors)
    turned = weighted_diversity(vectors[order], similarity[order])
    assert turned == weighted_diversity(vectors, similarity)


def test_ten_thousand_images_need_less_than_a_gigabyte():
    vectors = embeddings(10_000, 512, mean=0.1)
    similarity = np.random.default_rng(1).uniform(0, 100, len(vectors))
    tracemalloc.start()
    try:
        found = diversity(vectors)
        weighted_diversity(vectors, similarity)
        find_extreme_pairs(vectors)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.count == 10_000 and found.standard_error > 0
    # The input's own copies alone are 40 MB each; all pairs at once would be 800 MB a matrix.
    assert 40e6 < peak < 700e6


def test_matrix_and_extreme_pairs(monkeypatch):
    vectors = embeddings(9, mean=0.3)
    matrix = compute_distance_matrix(vectors)
    plain = [[distance(u, v) for v in vectors.tolist()] for u in vectors.tolist()]
    np.testing.assert_allclose(matrix, plain, atol=1e-6)
    assert (np.diagonal(matrix) == 0).all()
    pairs = {(i, j): plain[i][j] for i, j in itertools.combinations(range(9), 2)}
    for block in (1, 2, 4, 100):
        monkeypatch.setitem(find_extreme_pairs.__globals__, "BLOCK", block)
        most, least = find_extreme_pairs(vectors)
        assert (most.first, most.second) == min(pairs, key=pairs.get)
        assert (least.first, least.second) == max(pairs, key=pairs.get)
        assert most.distance == pytest.approx(min(pairs.values()), abs=1e-6)
        assert least.distance == pytest.approx(max(pairs.values()), abs=1e-6)


def test_the_standard_error_is_that_of_drawing_images_again():
    """Against draws written out, with pairs of one image with itself left out."""
    vectors, random = embeddings(12, 4, mean=0.4), np.random.default_rng(5)
    matrix, means = compute_distance_matrix(vectors), []
    for _ in range(3000):
        drawn = random.integers(0, 12, 12)
        pairs = [(i, j) for i, j in itertools.combinations(drawn, 2) if i != j]
        # A pair of equal draws counts in the number of pairs only where the images differ.
        means.append(np.mean([matrix[i, j] for i, j in pairs]))
    found = diversity(vectors)
    assert found.standard_error == pytest.approx(np.std(means), rel=0.1)
    assert found.count == 12


def test_the_standard_error_is_the_spread_of_the_score():
    """Over batches drawn anew from one source, the scores spread as each batch says."""
    batches = [diversity(embeddings(60, 3, seed=s, mean=1.0)) for s in range(60)]
    spread = np.std([b.mean for b in batches], ddof=1)
    assert np.mean([b.standard_error for b in batches]) == pytest.approx(spread, rel=0.3)


def test_two_images_have_no_standard_error():
    assert math.isnan(diversity(embeddings(2)).standard_error)
    assert str(Estimate(3.14159, float("nan"), 2)) == "3.14"
    assert str(Estimate(3.14159, 0.5, 3)) == "3.14 ± 0.50"


def test_equal_distances_give_the_first_pair(monkeypatch):
    for block in (1, 2, 100):
        monkeypatch.setitem(find_extreme_pairs.__globals__, "BLOCK", block)
        most, least = find_extreme_pairs(np.eye(4))
        assert (most.first, most.second) == (least.first, least.second) == (0, 1)


def test_the_standard_error_of_a_mean_is_the_spread_of_means():
    """Over samples drawn anew from one source, the means spread as each sample says."""
    random = np.random.default_rng(0)
    samples = random.exponential(3, (4000, 25))
    found = [estimate_mean(sample) for sample in samples]
    assert found[0].mean == pytest.approx(math.fsum(samples[0]) / 25) and found[0].count == 25
    variance = np.mean([estimate.standard_error**2 for estimate in found])
    assert variance == pytest.approx(np.var([estimate.mean for estimate in found]), rel=0.1)
    assert variance == pytest.approx(3**2 / 25, rel=0.03)  # the variance is unbiased
    assert estimate_mean([7.0, 7.0, 7.0]).standard_error == 0
    assert math.isnan(estimate_mean([7.0]).standard_error)


def test_bad_input():
    for call in (diversity, compute_distance_matrix, find_extreme_pairs):
        assert "shape (4,)" in sentence(call, np.ones(4))
        assert "Embedding 2 of 3 has length 0" in sentence(call, [[1.0], [0.0], [2.0]])
        assert "Embedding 1 of 2 has length nan" in sentence(call, [[np.nan], [1.0]])
