"""One application of a bank to a U-Net: strength, schedule, region and rows (DESIGN §4, §6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bank import Bank
from .errors import RetrievalError
from .retrieval import RetrievalSite
from .unet import SkipHook

Guidance = Literal["cond", "both"]
GUIDANCES: tuple[str, ...] = get_args(Guidance)
COND = 0


@dataclass(frozen=True, eq=False)
class Retrieval:
    """What is added to the skip features while sampling; immutable.

    Attributes:
        sites: the retrieval network's layers by site.
        bank: what is attended to, on the features' device and of their type.
        strength: multiplies what was retrieved; 0 switches retrieval off.
        start, end: the part of sampling in which it acts, fractions 0 (all noise) to 1.
        guidance: "cond": only conditional rows retrieve; "both": unconditional rows too.
        region: [H, W] of 0..1 over the image, or None for everywhere.

    Raises:
        RetrievalError: a strength that is not finite, a schedule outside 0..1, an unknown
            guidance, or a region of another shape.
    """

    sites: Mapping[str, nn.Module]
    bank: Bank
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guidance: Guidance = "cond"
    region: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise RetrievalError(
                f"Retrieval starts at {self.start:g} and ends at {self.end:g}; both must lie "
                "between 0 and 1, the start not above the end."
            )
        if not math.isfinite(self.strength):
            raise RetrievalError(
                f"The retrieval strength is {self.strength}; give a finite number (0 switches "
                "retrieval off)."
            )
        if self.region is not None and (self.region.ndim != 2 or not self.region.numel()):
            raise RetrievalError(
                f"The region mask has shape {list(self.region.shape)}; give one mask of "
                "[height, width]."
            )
        if self.guidance not in GUIDANCES:
            raise RetrievalError(
                f"There is no guidance '{self.guidance}'; choose 'cond' (conditional rows) or "
                "'both'."
            )

    def active(self, progress: float) -> bool:
        """Whether anything is to be done at all at this point of sampling."""
        return self.strength != 0 and not self.bank.empty and self.start <= progress <= self.end

    def hook(self, cond_or_uncond: Sequence[int], progress: float) -> SkipHook | None:
        """A U-Net's `skip_hook` for one step, or None if nothing is to be done.

        Args:
            cond_or_uncond: the batch's chunks in order, 0 for conditional, 1 for unconditional.
            progress: 0 at the first step's noise, 1 at none.
        """
        if not self.active(progress):
            return None

        def hook(site: str, h: Tensor) -> Tensor:
            return self.apply(site, h, cond_or_uncond)

        return hook

    def apply(self, site: str, h: Tensor, cond_or_uncond: Sequence[int]) -> Tensor:
        """h [B, C, H, W] with what the site retrieves added to the rows that retrieve.

        Each chunk of rows is served by all of the bank's G banks, B / chunks / G rows each.
        """
        both = self.guidance == "both"
        wanted = [i for i, kind in enumerate(cond_or_uncond) if both or kind == COND]
        if not wanted:
            return h
        if len(wanted) == len(cond_or_uncond) and self._shared(site, wanted):
            return h + self._retrieved(site, h)
        chunks = list(h.chunk(len(cond_or_uncond)))
        if self._shared(site, wanted):
            joined = torch.cat([chunks[i] for i in wanted])
            added = self._retrieved(site, joined).chunk(len(wanted))
        else:
            added = tuple(self._retrieved(site, chunks[i]) for i in wanted)
        for i, residual in zip(wanted, added):
            chunks[i] = chunks[i] + residual
        return torch.cat(chunks)

    def _shared(self, site: str, wanted: Sequence[int]) -> bool:
        """Whether one call can serve all wanted chunks: the bank serves runs of rows in order."""
        return len(wanted) == 1 or self.bank.sites[site].keys.shape[0] == 1

    def _retrieved(self, site: str, h: Tensor) -> Tensor:
        layer = self.sites[site]
        assert isinstance(layer, RetrievalSite)
        retrieved = layer(h, self.bank.sites[site]) * self.strength
        if self.region is not None:
            retrieved = retrieved * _region(self.region, h)
        return retrieved


def _region(region: Tensor, h: Tensor) -> Tensor:
    """The region at the features' resolution [1, 1, H, W], edges kept soft."""
    region = region.to(h.device, torch.float32)[None, None]  # halves have no antialiasing on CPUs
    return F.interpolate(region, size=h.shape[-2:], mode="bilinear", antialias=True).to(h)
