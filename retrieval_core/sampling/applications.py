"""One application of a bank to a U-Net: strength, schedule, region and rows (DESIGN §4, §6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ..bank.site_bank import Bank
from ..errors import RetrievalError
from ..network.retrieval_site import RetrievalSite
from ..network.unet import SelfAttentionHook, SkipHook
from .controls import CONSTANT, StrengthCurve
from .isolation import check_apart, isolation_hook
from .regions import queries_in, region_at

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
        curve: of the strength, from start to end.
        site_strength: site -> factor of the strength; 1 for a site that is not in it.
        outputs: (site, device, type) -> `RetrievalSite.output_matrix`, filled while sampling and
            shared by `dataclasses.replace`; the weights are not to change meanwhile.
        apart: until which part of sampling the region is kept apart from those of other
            applications that are kept apart too (`isolation`); 0 for never.
        places: the region at each site, filled while sampling.

    Raises:
        RetrievalError: a strength that is not finite, a schedule outside 0..1, an unknown
            guidance, a region of another shape, or regions apart outside 0..1.
    """

    hooks: ClassVar[str] = "skip_hook"  # the argument of the U-Net that takes `hook`

    sites: Mapping[str, nn.Module]
    bank: Bank
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guidance: Guidance = "cond"
    region: Tensor | None = None
    curve: StrengthCurve = CONSTANT
    site_strength: Mapping[str, float] = field(default_factory=dict)
    outputs: dict[tuple, Tensor] = field(default_factory=dict, repr=False)
    apart: float = 0.0
    places: dict[tuple, tuple] = field(init=False, default_factory=dict, repr=False)

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

    def arguments(self, cond_or_uncond: Sequence[int], progress: float) -> dict[str, Any]:
        """What a U-Net is called with at one step, beside its inputs; see `hook`."""
        return {self.hooks: self.hook(cond_or_uncond, progress)}

    def isolated_at(self, progress: float) -> bool:
        """Whether its region is kept apart from others at a point of sampling."""
        acts = self.strength != 0 and not self.bank.empty
        return acts and self.region is not None and 0 < self.apart and progress <= self.apart

    def strength_at(self, progress: float) -> float:
        """The strength at a point of sampling; 0 where nothing is to be done at all."""
        if self.bank.empty or not self.start <= progress <= self.end:
            return 0.0
        length = self.end - self.start
        return self.strength * self.curve.at((progress - self.start) / length if length else 0.0)

    def hook(self, cond_or_uncond: Sequence[int], progress: float) -> SkipHook | None:
        """A U-Net's `skip_hook` for one step, or None if nothing is to be done.

        Args:
            cond_or_uncond: the batch's chunks in order, 0 for conditional, 1 for unconditional.
            progress: 0 at the first step's noise, 1 at none.
        """
        strength = self.strength_at(progress)
        if strength == 0:
            return None

        def hook(site: str, h: Tensor) -> Tensor:
            return self.apply(site, h, cond_or_uncond, strength)

        return hook

    def apply(
        self, site: str, h: Tensor, cond_or_uncond: Sequence[int], strength: float | None = None
    ) -> Tensor:
        """h [B, C, H, W] with what the site retrieves added to the rows that retrieve.

        Each chunk of rows is served by all of the bank's G banks, B / chunks / G rows each.

        Args:
            strength: at this step (`strength_at`); by default the constant one.
        """
        strength = self.strength if strength is None else strength
        strength *= self.site_strength.get(site, 1.0)
        both = self.guidance == "both"
        wanted = [i for i, kind in enumerate(cond_or_uncond) if both or kind == COND]
        if not wanted or strength == 0:
            return h
        if len(wanted) == len(cond_or_uncond) and self._shared(site, wanted):
            return self._added(site, h, strength)
        chunks = list(h.chunk(len(cond_or_uncond)))
        if self._shared(site, wanted):
            joined = torch.cat([chunks[i] for i in wanted])
            served = self._added(site, joined, strength).chunk(len(wanted))
        else:
            served = tuple(self._added(site, chunks[i], strength) for i in wanted)
        for i, chunk in zip(wanted, served):
            chunks[i] = chunk
        return torch.cat(chunks)

    def _shared(self, site: str, wanted: Sequence[int]) -> bool:
        """Whether one call can serve all wanted chunks: the bank serves runs of rows in order."""
        return len(wanted) == 1 or self.bank.sites[site].keys.shape[0] == 1

    def _added(self, site: str, h: Tensor, strength: float) -> Tensor:
        """h + strength * region * zero_conv(W_o attended)."""
        layer = self.sites[site]
        assert isinstance(layer, RetrievalSite)
        bank = self.bank.sites[site]
        region, asked = self._place(site, layer, h)
        if torch.is_grad_enabled():  # training: both matrices learn, and change with every step
            retrieved = layer(h, bank) * strength
            return h + (retrieved if region is None else retrieved * region)
        if asked is not None and not len(asked):
            return h
        tokens = layer.attended_pooled(h, bank, asked).transpose(1, 2)
        matrix = self._output(site, layer, h).expand(h.shape[0], -1, -1)
        if layer.pool == 1 and asked is None:
            # One product with the two matrices' product, and the sum with h in the same pass.
            if region is not None:
                tokens = tokens * region.flatten(2)
            return torch.baddbmm(h.flatten(2), matrix, tokens, alpha=strength).view_as(h)
        retrieved = layer.spread(matrix @ tokens, h, asked)
        retrieved = retrieved if region is None else retrieved * region
        return torch.add(h, retrieved, alpha=strength)

    def _place(
        self, site: str, layer: RetrievalSite, h: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The region at the features h, and the queries that count in it; see `queries_in`."""
        if self.region is None:
            return None, None
        key = (site, h.device, h.dtype, h.shape[-2:])
        if key not in self.places:
            region = region_at(self.region, h)
            self.places[key] = region, queries_in(region, layer.pool)
        return self.places[key]

    def _output(self, site: str, layer: RetrievalSite, h: Tensor) -> Tensor:
        key = (site, h.device, h.dtype)
        if key not in self.outputs:
            self.outputs[key] = layer.output_matrix(h)
        return self.outputs[key]


@dataclass(frozen=True, eq=False)
class Several:
    """Several applications on one U-Net, in order, such as one a region; see `Retrieval`."""

    applied: Sequence[Retrieval]
    isolations: dict[tuple[int, ...], SelfAttentionHook | None] = field(
        init=False, default_factory=dict, repr=False
    )  # by the applications kept apart: what a hook knows of the regions serves all steps

    def arguments(self, cond_or_uncond: Sequence[int], progress: float) -> dict[str, Any]:
        """As of a single one, and the base's self-attention kept within regions."""
        apart = tuple(i for i, one in enumerate(self.applied) if one.isolated_at(progress))
        if apart not in self.isolations:
            regions = (self.applied[i].region for i in apart)
            self.isolations[apart] = isolation_hook([r for r in regions if r is not None])
        return {
            Retrieval.hooks: self.hook(cond_or_uncond, progress),
            "self_attention": self.isolations[apart],
        }

    def hook(self, cond_or_uncond: Sequence[int], progress: float) -> SkipHook | None:
        """All of their hooks one after another, or None if none has anything to do."""
        found = [one.hook(cond_or_uncond, progress) for one in self.applied]
        active = [hook for hook in found if hook is not None]
        if not active:
            return None

        def hook(site: str, h: Tensor) -> Tensor:
            for one in active:
                h = one(site, h)
            return h

        return hook
