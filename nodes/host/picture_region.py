"""A region at the resolution of the latent being sampled, cropped to a conditioning's area."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import comfy.utils
from torch import Tensor

from ...retrieval_core.sampling.applications import Application
from .step_context import Area, StepContext


@dataclass(eq=False)
class PictureRegion:
    """A region over the picture. Caches its crops by latent size and area, until the sampler ends.

    Attributes:
        mask: [H, W] of 0..1.
        apart: see `Application`.
    """

    mask: Tensor
    apart: float = 0.0
    _crops: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict) -> PictureRegion:
        return self

    @classmethod
    def from_retrieval(cls, retrieval: Application) -> PictureRegion | None:
        """The region that an application acts in; None for everywhere."""
        return None if retrieval.region is None else cls(retrieval.region, retrieval.apart)

    def crop(self, context: StepContext, area: Area | None) -> Tensor:
        """Resizes the mask to the latent's resolution and crops it to an area, if any: [h, w]."""
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
