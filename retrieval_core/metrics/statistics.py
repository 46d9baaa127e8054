"""Means with their standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RetrievalError

RESAMPLES = 1000
# Rows of resampling counts held at a time: 10,000 images then need 5 MB.
CHUNK = 64


@dataclass(frozen=True)
class Estimate:
    """A mean and its bootstrap standard error, in the unit of what was averaged.

    standard_error is nan where it cannot be estimated: see the function that made it. count: the
    number of values (images, conditionings) that were resampled.
    """

    mean: float
    standard_error: float
    count: int

    def __str__(self) -> str:
        error = "" if np.isnan(self.standard_error) else f" ± {self.standard_error:.2f}"
        return f"{self.mean:.2f}{error}"


def resampling_counts(count: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of `count` items is drawn, with replacement: [resamples, count] float64."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), resamples).astype(np.float64)


def bootstrap(
    values: Sequence[float] | np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Mean of independent values and its bootstrap standard error (Efron, 1979).

    The standard error is the standard deviation of the means of `resamples` draws of as many values
    with replacement; nan for a single value. `seed` decides the draws.

    Raises:
        RetrievalError: no value, or one that is not finite.
    """
    values = np.asarray(values, np.float64).reshape(-1)
    if values.size == 0:
        raise RetrievalError("There are no values to average; score at least one image.")
    if not np.isfinite(values).all():
        raise RetrievalError(
            f"Value {int(np.flatnonzero(~np.isfinite(values))[0]) + 1} of {values.size} is not "
            "finite; leave that image out, or score it again."
        )
    if values.size == 1:
        return Estimate(float(values[0]), float("nan"), 1)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, CHUNK):
        rows = min(CHUNK, resamples - start)
        means.append(values[rng.integers(values.size, size=(rows, values.size))].mean(1))
    return Estimate(float(values.mean()), float(np.concatenate(means).std(ddof=1)), values.size)
