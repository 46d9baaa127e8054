"""A region as the picture being drawn has it: at the latent's size, cut out at an area's place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import comfy.utils
from torch import Tensor

from ...retrieval_core.sampling.applications import Application
from .step_context import Area, StepContext


@dataclass(frozen=True, eq=False)
class PictureRegion:
    """A region over the picture. It caches its crops by latent size and area until `cleanup`.

    Attributes:
        mask: [H, W] of 0..1.
        apart: until which part of sampling it is kept apart from the other regions of a model, 0
            for never.
    """

    mask: Tensor
    apart: float = 0.0
    _crops: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict) -> PictureRegion:
        return self

    @classmethod
    def of(cls, application: Application) -> PictureRegion | None:
        """Where an application acts; None for everywhere."""
        return None if application.region is None else cls(application.region, application.apart)

    def crop(self, context: StepContext, area: Area | None) -> Tensor:
        """[h, w] at the latent's resolution, cut out at a conditioning's area, if it has one."""
        key = (context.shape, area)
        found = self._crops.get(key)
        if found is None:
            found = comfy.utils.reshape_mask(self.mask, (1, 1, *context.shape))[0, 0]
            if area is not None:
                height, width, y, x = area
                found = found[y : y + height, x : x + width]
            self._crops[key] = found
        return found

    def cleanup(self) -> None:
        self._crops.clear()
