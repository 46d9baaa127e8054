"""Which reference each part of a picture came from: attention shares kept while sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .injection import COND, Retrieval
from .retrieval import RetrievalSite


@dataclass
class Shares:
    """Sum of the attention shares [B, 1 + references, h, w] seen so far, and how many."""

    total: Tensor | None = None
    steps: int = 0

    def add(self, shares: Tensor) -> None:
        self.total = shares if self.total is None else self.total + shares
        self.steps += 1

    def mean(self) -> Tensor:
        """Mean share over the steps, the null token's first; the shares of a place add up to 1."""
        assert self.total is not None, "nothing was retrieved yet"
        return self.total / self.steps


@dataclass(frozen=True, eq=False)
class RecordedRetrieval(Retrieval):
    """A `Retrieval` that also records, at `site`, where the conditional rows looked.

    The result is bit for bit that of `Retrieval`; the cost is one attention map of that site.
    """

    site: str = "middle"
    shares: Shares = field(default_factory=Shares)

    def apply(self, site: str, h: Tensor, cond_or_uncond: Sequence[int]) -> Tensor:
        if site == self.site:
            chunks = h.chunk(len(cond_or_uncond))
            rows = next((c for c, kind in zip(chunks, cond_or_uncond) if kind == COND), None)
            layer = self.sites[site]
            if rows is not None and isinstance(layer, RetrievalSite):
                bank = self.bank.sites[site]
                self.shares.add(layer.shares(rows, bank, int(bank.owner.max()) + 1))
        return super().apply(site, h, cond_or_uncond)


def strongest_reference(shares: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The reference most looked at in each pixel, and how much was retrieved there.

    Args:
        shares: [B, 1 + references, h, w], the null token's first (`Shares.mean`).

    Returns:
        index [B, H, W] of the reference, and confidence [B, H, W] in 0..1: its share.
    """
    smooth = F.interpolate(shares, size=(height, width), mode="bilinear", align_corners=False)
    best, index = smooth[:, 1:].max(1)
    return index, best.clamp(0, 1)


def overlay(pictures: Tensor, shares: Tensor, colours: Sequence[Sequence[float]]) -> Tensor:
    """Pictures [B, 3, H, W] in grey, tinted with the colour of the reference retrieved from.

    Args:
        shares: see `strongest_reference`.
        colours: one (r, g, b) in 0..1 a reference.
    """
    index, confidence = strongest_reference(shares, *pictures.shape[-2:])
    palette = torch.tensor(colours, dtype=pictures.dtype, device=pictures.device)
    tint = palette[index].movedim(-1, 1)
    grey = pictures.mean(1, keepdim=True).expand_as(pictures)
    strength = 0.25 + 0.45 * (confidence / confidence.amax((1, 2), keepdim=True).clamp_min(1e-8))
    return torch.lerp(grey, tint, strength[:, None])
