"""Which reference each part of a picture came from: attention shares kept while sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank.site_bank import SiteBank
from ..network.retrieval_site import RetrievalSite
from ..network.unet import MIDDLE, UNetConfig
from .applications import COND, Retrieval
from .regions import region_at


def map_site(config: UNetConfig) -> str:
    """The site that a map is read from: the last one that a transformer block leads to.

    It knows what a place shows, and is coarse enough for its attention to cost next to nothing.
    """
    plan = enumerate(config.encoder_plan(), 1)
    read = [f"input_{index}" for index, (_, _, _, depth) in plan if depth]
    return read[-1] if read else MIDDLE


@dataclass
class Shares:
    """The attention shares [B, 1 + references, H, W] seen so far: their sum and, for each place,
    how often it was seen.
    """

    total: Tensor | None = None
    seen: Tensor | None = None
    steps: int = 0

    def add(
        self,
        shares: Tensor,
        canvas: tuple[int, int] | None = None,
        corner: tuple[int, int] = (0, 0),
    ) -> None:
        """Adds shares [B, 1 + references, h, w], the null token's first.

        Args:
            canvas: (H, W) of the whole picture at this site, where the shares are a crop of it.
            corner: (y, x) of the crop.
        """
        height, width = shares.shape[-2:]
        whole = (*shares.shape[:2], *(canvas or (height, width)))
        if self.total is None or self.total.shape != whole:
            self.total, self.seen = shares.new_zeros(whole), shares.new_zeros(whole[-2:])
            self.steps = 0
        assert self.seen is not None
        (y, x) = corner
        self.total[..., y : y + height, x : x + width] += shares
        self.seen[y : y + height, x : x + width] += 1
        self.steps += 1

    def mean(self) -> Tensor:
        """Mean share over the steps, the null token's first; the shares of a place add up to 1."""
        assert self.total is not None and self.seen is not None, "nothing was retrieved yet"
        mean = self.total / self.seen.clamp_min(1)
        mean[:, 0] += (self.seen == 0).to(mean)
        return mean


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """The shares of several applications as those of one: [B, 1 + all references, H, W].

    Args:
        parts: mean shares [B, 1 + references, H, W] of each. Where applications overlap, so that
            together they retrieve more than everything, their shares are scaled down to all of it.
    """
    retrieved = torch.cat([part[:, 1:] for part in parts], 1)
    retrieved = retrieved / retrieved.sum(1, keepdim=True).clamp_min(1)
    return torch.cat([(1 - retrieved.sum(1, keepdim=True)).clamp_min(0), retrieved], 1)


def shares_of(
    retrieval: Retrieval, site: str, h: Tensor, bank: SiteBank, references: int
) -> Tensor:
    """Where the features h [B, C, H, W] of a site look, by reference, within the region.

    Args:
        bank: of the site; from before its tokens were merged it tells references apart better.

    Returns:
        [B, 1 + references, H, W], the null token's share first.
    """
    layer = retrieval.sites[site]
    assert isinstance(layer, RetrievalSite)
    shares = layer.shares(h, bank, references)
    if retrieval.region is None:
        return shares
    retrieved = shares[:, 1:] * region_at(retrieval.region, h).to(shares)
    return torch.cat([1 - retrieved.sum(1, keepdim=True), retrieved], 1)


@dataclass(frozen=True, eq=False)
class RecordedRetrieval(Retrieval):
    """A `Retrieval` that also records, at `site`, where the conditional rows looked.

    The result is bit for bit that of `Retrieval`; the cost is one attention map of that site.

    Attributes:
        seen: what the shares are read from, by default the bank's own site; a bank's site from
            before its tokens were merged tells references apart better.
        references: how many there are; 0 for as many as the bank's tokens name.
    """

    site: str = "middle"
    shares: Shares = field(default_factory=Shares)
    seen: SiteBank | None = None
    references: int = 0

    def apply(
        self, site: str, h: Tensor, cond_or_uncond: Sequence[int], strength: float | None = None
    ) -> Tensor:
        if site == self.site:
            chunks = h.chunk(len(cond_or_uncond))
            rows = next((c for c, kind in zip(chunks, cond_or_uncond) if kind == COND), None)
            if rows is not None:
                bank = self.seen or self.bank.sites[site]
                count = self.references or int(bank.owner.max()) + 1
                self.shares.add(shares_of(self, site, rows, bank, count))
        return super().apply(site, h, cond_or_uncond, strength)


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


def reference_masks(shares: Tensor, height: int, width: int, hard: bool) -> Tensor:
    """A mask of each reference, [B, references, H, W] in 0..1.

    Args:
        shares: see `strongest_reference`.
        hard: 1 in each place for the one reference most looked at, and for none where the null
            token had more than all references together; otherwise the shares themselves.
    """
    smooth = F.interpolate(shares, size=(height, width), mode="bilinear", align_corners=False)
    if not hard:
        return smooth[:, 1:].clamp(0, 1)
    best = F.one_hot(smooth[:, 1:].argmax(1), shares.shape[1] - 1).movedim(-1, 1)
    return (best * (smooth[:, :1] <= 0.5)).to(shares)
