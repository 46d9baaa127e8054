"""Random geometric augmentation, drawn independently for sources and targets (§5.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import RetrievalError


@dataclass(frozen=True)
class View:
    """One drawn geometry, relative to the square that would be shown without augmentation.

    scale: side of the square shown; below 1 crops in, above 1 leaves a padded border.
    shift: move of its centre in sides of the unaugmented square (right, down). flip: mirrored.
    """

    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    flip: bool = False


UNCHANGED = View()


@dataclass(frozen=True)
class RandomView:
    """Distribution of views. The defaults change nothing.

    scale: (lowest, highest), drawn uniformly in the logarithm. shift: largest move each way, in
    sides. flip: probability of mirroring. Raises RetrievalError for values out of range.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    flip: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high < float("inf"):
            raise RetrievalError(f"The view scale is {self.scale}; give 0 < lowest <= highest.")
        if not 0 <= self.shift <= 1:
            raise RetrievalError(f"The view shift is {self.shift}; it must be 0 to 1.")
        if not 0 <= self.flip <= 1:
            raise RetrievalError(f"The flip probability is {self.flip}; it must be 0 to 1.")

    def draw(self, rng: np.random.Generator) -> View:
        """Always takes four numbers from `rng`, whatever the settings."""
        size, right, down, side = rng.random(4).tolist()
        low, high = self.scale
        shift = (self.shift * (2 * right - 1), self.shift * (2 * down - 1))
        return View(low * (high / low) ** size, shift, side < self.flip)
