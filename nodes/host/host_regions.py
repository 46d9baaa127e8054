"""A region as the picture being drawn has it: at the latent's size, cut out at an area's place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import comfy.utils
from torch import Tensor

from ...retrieval_core.sampling.applications import Retrieval
from . import step

Area = tuple[int, ...]  # height, width, y, x in latent pixels


@dataclass(frozen=True, eq=False)
class Region:
    """mask: [H, W] of 0..1 over the picture. apart: until which part of sampling it is kept apart
    from the other regions of a model, 0 for never.
    """

    mask: Tensor
    apart: float = 0.0
    _kept: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict) -> Region:
        return self

    @classmethod
    def of(cls, retrieval: Retrieval) -> Region | None:
        """Where an application acts; None for everywhere."""
        return None if retrieval.region is None else cls(retrieval.region, retrieval.apart)

    def over(self, noted: step.Step, area: Area | None) -> Tensor:
        """[h, w] at the latent's resolution, cut out at a conditioning's area, if it has one."""
        key = (noted.shape, area)
        if key not in self._kept:
            cut = comfy.utils.reshape_mask(self.mask, (1, 1, *noted.shape))[0, 0]
            if area is not None:
                height, width, y, x = area
                cut = cut[y : y + height, x : x + width]
            self._kept[key] = cut
        return self._kept[key]

    def cleanup(self) -> None:
        """Forgets what was cut out."""
        self._kept.clear()
