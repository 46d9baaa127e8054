"""Applications of references to a U-Net: strength, schedule, region and rows (DESIGN §4, §6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..bank.site_bank import Bank
from ..errors import RetrievalError
from ..network.controlnet import Guidance
from ..network.unet import Attention
from .controls import CONSTANT, StrengthCurve
from .frozen_site import FrozenSite, SiteRegion
from .isolation import Partition, attend_apart, partition
from .joint_attention import Source
from .regions import add_shifts, find_active, resize_region

COND = 0


@dataclass(eq=False)
class Application:
    """One application of a bank: when, where and how strongly it acts.

    A subclass acts on the skip features (`add_retrieved`), in self-attention (`source`) or on the
    step's prediction (`observe`, `shift`).

    Attributes:
        bank: of the references, on the features' device and of their type.
        strength: multiplies the retrieved features; 0 switches retrieval off.
        start, end: the fraction of sampling in which it acts, 0 (all noise) to 1.
        guidance: "cond": only conditional rows retrieve; "both": unconditional rows too.
        region: [H, W] of 0..1 over the image, or None for everywhere.
        curve: of the strength, from start to end.
        site_strength: site or layer -> factor of the strength; 1 for those not listed.
        apart: the region is isolated from other isolated ones (`isolation`) up to this fraction of
            sampling; 0 for never.

    Raises:
        RetrievalError: a strength that is not finite, or a schedule outside 0..1.
    """

    bank: Bank
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guidance: Guidance = "cond"
    region: Tensor | None = None
    curve: StrengthCurve = CONSTANT
    site_strength: Mapping[str, float] = field(default_factory=dict)
    apart: float = 0.0

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

    def strength_at(self, progress: float) -> float:
        """The strength at a progress of sampling, 0 (the first step's noise) to 1 (none)."""
        if self.bank.empty or not self.start <= progress <= self.end:
            return 0.0
        length = self.end - self.start
        return self.strength * self.curve.at((progress - self.start) / length if length else 0.0)

    def isolated_at(self, progress: float) -> bool:
        """Whether its region is isolated from others at a progress of sampling."""
        acts = self.strength != 0 and not self.bank.empty
        return acts and self.region is not None and 0 < self.apart and progress <= self.apart

    def retrieves(self, cond_or_uncond: Sequence[int]) -> list[bool]:
        """Which chunks of a batch (0 conditional, 1 unconditional) retrieve."""
        return [self.guidance == "both" or kind == COND for kind in cond_or_uncond]

    def add_retrieved(
        self, site: str, h: Tensor, cond_or_uncond: Sequence[int], strength: float
    ) -> Tensor:
        """Adds what a site retrieves to its skip features h [B, C, H, W], in rows that retrieve."""
        return h

    def source(
        self, layer: Attention, q: Tensor, size: tuple[int, int], progress: float, strength: float
    ) -> Source | None:
        """The bank that a self-attention layer of `size` (height, width) also attends to."""
        return None

    def observe(
        self,
        layer: Attention,
        size: tuple[int, int],
        k: Tensor,
        cond_or_uncond: Sequence[int],
        progress: float,
    ) -> None:
        """Sees the keys [B, H * W, D] of a self-attention layer, for `shift`."""

    def shift(
        self, x0: Tensor, text: Tensor | None, progress: float, strength: float
    ) -> Tensor | None:
        """The shift [B, C, H, W] of a step's prediction x0, or None.

        Args:
            text: x0 of the prompt less x0 of the negative prompt; None without one.
        """
        return None


@dataclass(eq=False)
class Retrieval(Application):
    """An application of a trained network, at the skip connections.

    Caches the resized region by site, device, type and resolution, for as long as it lives.

    Attributes:
        sites: the network's sites (`freeze_sites`).
    """

    sites: Mapping[str, FrozenSite] = field(default_factory=dict)
    _regions: dict[tuple, SiteRegion] = field(init=False, default_factory=dict, repr=False)

    def add_retrieved(
        self, site: str, h: Tensor, cond_or_uncond: Sequence[int], strength: float
    ) -> Tensor:
        """See `Application`. Each chunk's rows fall into G equal runs, one for each entry of the
        bank."""
        strength *= self.site_strength.get(site, 1.0)
        wanted = [i for i, asks in enumerate(self.retrieves(cond_or_uncond)) if asks]
        if not wanted or strength == 0:
            return h
        layer, bank, region = self.sites[site], self.bank.sites[site], self._find_region(site, h)
        # Several entries serve runs of rows within a chunk, so that chunks cannot be joined.
        together = len(wanted) == 1 or len(bank.keys) == 1
        if together and len(wanted) == len(cond_or_uncond):
            return layer.add_retrieved(h, bank, strength, region)
        chunks = list(h.chunk(len(cond_or_uncond)))
        if together:
            joined = torch.cat([chunks[i] for i in wanted])
            served = layer.add_retrieved(joined, bank, strength, region).chunk(len(wanted))
        else:
            served = [layer.add_retrieved(chunks[i], bank, strength, region) for i in wanted]
        for i, chunk in zip(wanted, served, strict=True):
            chunks[i] = chunk
        return torch.cat(chunks)

    def _find_region(self, site: str, h: Tensor) -> SiteRegion | None:
        if self.region is None:
            return None
        key = (site, h.device, h.dtype, h.shape[2:])
        if key not in self._regions:
            mask = resize_region(self.region, h)
            self._regions[key] = SiteRegion(mask, find_active(mask, self.sites[site].pool))
        return self._regions[key]


class Applications:
    """Several applications on one U-Net, in order, such as one for each region.

    Caches the partitions of isolated regions by regions, layer size and device, for as long as it
    lives.
    """

    def __init__(self, applications: Sequence[Application]):
        self.applications = list(applications)
        self._partitions: dict[tuple, Partition | None] = {}

    def hooks(self, cond_or_uncond: Sequence[int], progress: float) -> dict[str, Any]:
        """Keyword arguments of the U-Net's call at one step; empty where nothing acts.

        Args:
            cond_or_uncond: the batch's chunks in order, 0 for conditional, 1 for unconditional.
            progress: 0 at the first step's noise, 1 at none.
        """
        acting = [(one, one.strength_at(progress)) for one in self.applications]
        acting = [(one, strength) for one, strength in acting if strength != 0]
        isolated = tuple(i for i, a in enumerate(self.applications) if a.isolated_at(progress))
        if not acting and len(isolated) < 2:
            return {}

        def add_retrieved(site: str, h: Tensor) -> Tensor:
            for one, strength in acting:
                h = one.add_retrieved(site, h, cond_or_uncond, strength)
            return h

        def attend(
            layer: Attention, size: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, heads: int
        ) -> Tensor:
            chunks: list[list[Source]] = [[] for _ in cond_or_uncond]
            for one, strength in acting:
                one.observe(layer, size, k, cond_or_uncond, progress)
                source = one.source(layer, q, size, progress, strength)
                if source is not None:
                    for chunk, asks in zip(chunks, one.retrieves(cond_or_uncond), strict=True):
                        chunk += [source] * asks
            partitions = [self._find_partition(isolated, size, q.device)] * len(chunks)
            return attend_apart(layer.attend, q, k, v, heads, chunks, partitions)

        return {"skip_hook": add_retrieved, "self_attention": attend}

    def shift(self, x0: Tensor, text: Tensor | None, progress: float) -> Tensor:
        """Shifts a step's prediction x0 [B, C, H, W]; see `Application.shift`."""
        shifts = []
        for one in self.applications:
            found = one.shift(x0, text, progress, one.strength_at(progress))
            if found is not None:
                shifts.append((found, one.region))
        return add_shifts(x0, shifts)

    def _find_partition(
        self, isolated: tuple[int, ...], size: tuple[int, int], device: torch.device
    ) -> Partition | None:
        key = (isolated, size, device)
        if key not in self._partitions:
            regions = [self.applications[i].region for i in isolated]
            self._partitions[key] = partition([r.to(device) for r in regions], size)
        return self._partitions[key]
