"""Means with their standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, in the unit of the averaged values.

    standard_error is nan where the values are too few to estimate it: see the function that
    returns the estimate. count: number of values (images, characters, conditionings).
    """

    mean: float
    standard_error: float
    count: int

    def __str__(self) -> str:
        error = "" if np.isnan(self.standard_error) else f" ± {self.standard_error:.2f}"
        return f"{self.mean:.2f}{error}"


def estimate_mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of n >= 1 independent values and its standard error, std / sqrt(n); nan for one value.

    The standard deviation is the unbiased one, with n - 1 in its denominator.
    """
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else np.nan
    return Estimate(float(values.mean()), float(error), values.size)
