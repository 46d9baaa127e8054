"""Random views and colours; source and target each get their own (§5.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import RetrievalError


@dataclass(frozen=True)
class View:
    """One drawn geometry, relative to the square that would be shown unchanged.

    scale: side of the square looked at; below 1 crops in, above 1 leaves a padded border.
    shift: move of its centre in sides of the unchanged square (right, down). flip: mirrored.
    """

    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    flip: bool = False


UNCHANGED = View()


@dataclass(frozen=True)
class RandomView:
    """scale: (lowest, highest), drawn uniformly in the logarithm. shift: largest move each way,
    in sides. flip: probability of mirroring. The defaults change nothing.
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


@dataclass(frozen=True)
class ColourJitter:
    """Largest relative change of brightness, contrast and saturation (0 to 1) and the largest
    turn of the hue (in turns, 0 to 0.5). The defaults change nothing.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise RetrievalError(f"The {name} jitter is {value}; it must be 0 to {most}.")

    def draw(self, rng: np.random.Generator) -> np.ndarray | None:
        """A colour matrix float32 [3, 4] for `recolour`, or None for no change.

        Always takes four numbers from `rng`, whatever the settings.
        """
        brightness, contrast, saturation, hue = (2 * rng.random(4) - 1).tolist()
        if not (self.brightness or self.contrast or self.saturation or self.hue):
            return None
        turn = _hue_matrix(self.hue * hue)
        grey = np.full((3, 1), 1.0) @ _LUMA[None]
        keep = 1 + self.saturation * saturation
        linear = (keep * np.eye(3) + (1 - keep) * grey) @ turn
        slope = (1 + self.contrast * contrast) * (1 + self.brightness * brightness)
        middle = 127.5 * (1 + self.brightness * brightness) * (-self.contrast * contrast)
        return np.concatenate([slope * linear, np.full((3, 1), middle)], 1).astype(np.float32)


@dataclass(frozen=True)
class Augmentation:
    """How one kind of picture (sources or targets) is varied. The defaults change nothing."""

    view: RandomView = RandomView()
    colour: ColourJitter = ColourJitter()


_LUMA = np.array([0.299, 0.587, 0.114])


def _hue_matrix(turns: float) -> np.ndarray:
    """Rotation of RGB about the grey axis: keeps greys, turns hues."""
    angle = 2 * np.pi * turns
    cos, sin = np.cos(angle), np.sin(angle)
    axis = np.sqrt(1 / 3)
    cross = axis * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    return cos * np.eye(3) + (1 - cos) / 3 * np.ones((3, 3)) + sin * cross


def recolour(image: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Apply a colour matrix [3, 4] to uint8 [H, W, 3]; the same array back for None."""
    if matrix is None:
        return image
    changed = image.reshape(-1, 3).astype(np.float32) @ matrix[:, :3].T
    changed += matrix[:, 3] + 0.5  # the cast below cuts; half a step makes it round
    return np.clip(changed, 0, 255, out=changed).astype(np.uint8).reshape(image.shape)
