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
from ..network.controlnet import GUIDANCES, Guidance
from ..network.unet import Attention, SelfAttentionHook, SkipHook
from .controls import CONSTANT, StrengthCurve
from .frozen_site import FrozenSite, SiteRegion
from .isolation import Partition, attend_apart, check_apart, partition
from .joint_attention import Source
from .regions import find_active, resize_region

COND = 0


@dataclass(frozen=True, eq=False)
class Application:
    """One application of a bank: when, where and how strongly it acts.

    A subclass acts on the skip features (`add_retrieved`) or in self-attention (`source`).

    Attributes:
        bank: what is attended to, on the features' device and of their type.
        strength: multiplies what was retrieved; 0 switches retrieval off.
        start, end: the part of sampling in which it acts, fractions 0 (all noise) to 1.
        guidance: "cond": only conditional rows retrieve; "both": unconditional rows too.
        region: [H, W] of 0..1 over the image, or None for everywhere.
        curve: of the strength, from start to end.
        site_strength: site or layer -> factor of the strength; 1 for one that is not in it.
        apart: until which part of sampling the region is kept apart from those of other
            applications that are kept apart too (`isolation`); 0 for never.

    Raises:
        RetrievalError: a strength that is not finite, a schedule outside 0..1, an unknown
            guidance, a region of another shape, or regions apart outside 0..1.
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
        check_apart(self.apart)
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

    def strength_at(self, progress: float) -> float:
        """The strength at a point of sampling, 0 (the first step's noise) to 1 (none); 0 where
        nothing is to be done at all."""
        if self.bank.empty or not self.start <= progress <= self.end:
            return 0.0
        length = self.end - self.start
        return self.strength * self.curve.at((progress - self.start) / length if length else 0.0)

    def isolated_at(self, progress: float) -> bool:
        """Whether its region is kept apart from others at a point of sampling."""
        acts = self.strength != 0 and not self.bank.empty
        return acts and self.region is not None and 0 < self.apart and progress <= self.apart

    def retrieves(self, cond_or_uncond: Sequence[int]) -> list[bool]:
        """Which chunks of a batch retrieve; 0 is a conditional chunk, 1 an unconditional one."""
        return [self.guidance == "both" or kind == COND for kind in cond_or_uncond]

    def add_retrieved(
        self, site: str, h: Tensor, cond_or_uncond: Sequence[int], strength: float
    ) -> Tensor:
        """Skip features h [B, C, H, W] with what the site retrieves added to rows that retrieve."""
        return h

    def source(
        self, layer: Attention, q: Tensor, size: tuple[int, int], progress: float, strength: float
    ) -> Source | None:
        """What a self-attention layer of `size` (height, width) also attends to."""
        return None


@dataclass(frozen=True, eq=False)
class Retrieval(Application):
    """An application of a trained network, at the skip connections.

    It caches the region at each site's resolution, for as long as it lives.

    Attributes:
        sites: the network's sites (`freeze_sites`).
    """

    sites: Mapping[str, FrozenSite] = field(default_factory=dict)
    _regions: dict[tuple, SiteRegion] = field(init=False, default_factory=dict, repr=False)

    def add_retrieved(
        self, site: str, h: Tensor, cond_or_uncond: Sequence[int], strength: float
    ) -> Tensor:
        """See `Application`. Each chunk of rows is served by all of the bank's G entries, B /
        chunks / G rows each."""
        strength *= self.site_strength.get(site, 1.0)
        wanted = [i for i, asks in enumerate(self.retrieves(cond_or_uncond)) if asks]
        if not wanted or strength == 0:
            return h
        layer, bank, region = self.sites[site], self.bank.sites[site], self._region(site, h)
        # The bank's entries serve runs of rows in order: chunks are only joined where it has one.
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

    def _region(self, site: str, h: Tensor) -> SiteRegion | None:
        if self.region is None:
            return None
        key = (site, h.device, h.dtype, h.shape[2:])
        if key not in self._regions:
            mask = resize_region(self.region, h)
            self._regions[key] = SiteRegion(mask, find_active(mask, self.sites[site].pool))
        return self._regions[key]


class Applications:
    """Several applications on one U-Net, in order, such as one for each region.

    It caches what each self-attention layer's positions may attend to where regions are kept apart,
    by layer size and regions, for as long as it lives.
    """

    def __init__(self, applications: Sequence[Application]):
        self.applications = list(applications)
        self._partitions: dict[tuple, Partition | None] = {}

    def hooks(self, cond_or_uncond: Sequence[int], progress: float) -> dict[str, Any]:
        """What a U-Net is called with at one step, beside its inputs; nothing where none acts.

        Args:
            cond_or_uncond: the batch's chunks in order, 0 for conditional, 1 for unconditional.
            progress: 0 at the first step's noise, 1 at none.
        """
        acting = [(one, one.strength_at(progress)) for one in self.applications]
        acting = [(one, strength) for one, strength in acting if strength != 0]
        apart = tuple(i for i, a in enumerate(self.applications) if a.isolated_at(progress))
        if not acting and len(apart) < 2:
            return {}
        skip_hook = self._skip_hook(acting, cond_or_uncond)
        return {
            "skip_hook": skip_hook,
            "self_attention": self._self_attention(acting, apart, cond_or_uncond, progress),
        }

    def _skip_hook(
        self, acting: Sequence[tuple[Application, float]], cond_or_uncond: Sequence[int]
    ) -> SkipHook:
        def hook(site: str, h: Tensor) -> Tensor:
            for one, strength in acting:
                h = one.add_retrieved(site, h, cond_or_uncond, strength)
            return h

        return hook

    def _self_attention(
        self,
        acting: Sequence[tuple[Application, float]],
        apart: tuple[int, ...],
        cond_or_uncond: Sequence[int],
        progress: float,
    ) -> SelfAttentionHook:
        def hook(
            layer: Attention, size: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, heads: int
        ) -> Tensor:
            chunks: list[list[Source]] = [[] for _ in cond_or_uncond]
            for one, strength in acting:
                source = one.source(layer, q, size, progress, strength)
                if source is not None:
                    for chunk, asks in zip(chunks, one.retrieves(cond_or_uncond), strict=True):
                        chunk += [source] * asks
            partitions = [self._partition(apart, size, q.device)] * len(chunks)
            return attend_apart(layer.attend, q, k, v, heads, chunks, partitions)

        return hook

    def _partition(
        self, apart: tuple[int, ...], size: tuple[int, int], device: torch.device
    ) -> Partition | None:
        key = (apart, size, device)
        if key not in self._partitions:
            regions = [self.applications[i].region for i in apart]
            self._partitions[key] = partition([r.to(device) for r in regions], size)
        return self._partitions[key]
