"""The protocol of methods that draw pictures; `comfy` has the one for a running ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from .characters import Character
from .protocol import Run


class Method(Protocol):
    """One way to draw characters from references.

    Attributes:
        name: of its curve. weights: the settings of its strength; (None,) where it has none.
        digest: changes with every setting that changes its pictures, except the weight.
        batch: number of runs to draw in one call.
    """

    name: str
    weights: Sequence[float | None]
    digest: str
    batch: int

    def draw(
        self, runs: Sequence[Run], characters: Mapping[str, Character], weight: float | None
    ) -> list[Tensor]:
        """The pictures [samples, 3, H, W] in 0..1 of each run."""
        ...
