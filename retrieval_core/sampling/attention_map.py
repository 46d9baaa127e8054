"""The retrieval map: attention shares of each reference, summed while sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..bank.site_bank import SiteBank
from ..network.retrieval_site import unpool_queries
from ..network.unet import MIDDLE, UNetConfig
from .applications import COND, Retrieval
from .regions import resize_region

_LOGITS = 1 << 24  # most attention logits in memory at once


def choose_map_site(config: UNetConfig) -> str:
    """The site that the map is measured at: the last one after a transformer block.

    Its features are semantic, and it is coarse enough for its attention to cost next to nothing.
    """
    plan = enumerate(config.encoder_plan(), 1)
    sites = [f"input_{index}" for index, (_, _, _, depth) in plan if depth]
    return sites[-1] if sites else MIDDLE


@dataclass
class Shares:
    """Sum of the attention shares [B, 1 + references, H, W] of the steps so far.

    Attributes:
        total: the sum. seen: [H, W], how many summands each position has.
    """

    total: Tensor | None = None
    seen: Tensor | None = None

    def add(
        self,
        shares: Tensor,
        canvas: tuple[int, int] | None = None,
        corner: tuple[int, int] = (0, 0),
    ) -> None:
        """Adds the shares [B, 1 + references, h, w] of one step, the null token's first.

        Args:
            canvas: (H, W) of the whole picture at this site, if the shares are of a crop.
            corner: (y, x) of the crop.
        """
        height, width = shares.shape[-2:]
        whole = (*shares.shape[:2], *(canvas or (height, width)))
        if self.total is None or self.total.shape != whole:
            self.total, self.seen = shares.new_zeros(whole), shares.new_zeros(whole[-2:])
        y, x = corner
        self.total[..., y : y + height, x : x + width] += shares
        self.seen[y : y + height, x : x + width] += 1

    def mean(self) -> Tensor:
        """Mean shares over the steps, the null token's first; they sum to 1 at each position."""
        assert self.total is not None and self.seen is not None, "nothing was retrieved yet"
        mean = self.total / self.seen.clamp_min(1)
        mean[:, 0] += (self.seen == 0).to(mean)
        return mean


def merge_shares(applications: Sequence[Tensor]) -> Tensor:
    """Merges the mean shares of several applications: [B, 1 + all references, H, W].

    Args:
        applications: [B, 1 + references, h, w] of each; resized to the largest resolution. Where
            the references' shares of overlapping applications sum to more than 1, they are scaled
            down to a sum of 1.
    """
    size = max((shares.shape[2:] for shares in applications), key=math.prod)
    retrieved = [
        shares[:, 1:]
        if shares.shape[2:] == size
        else F.interpolate(shares[:, 1:], size=tuple(size), mode="bilinear")
        for shares in applications
    ]
    joined = torch.cat(retrieved, 1)
    joined = joined / joined.sum(1, keepdim=True).clamp_min(1)
    return torch.cat([(1 - joined.sum(1, keepdim=True)).clamp_min(0), joined], 1)


def measure_shares(
    retrieval: Retrieval, site: str, h: Tensor, bank: SiteBank, references: int
) -> Tensor:
    """Attention shares of each reference at a site's features h [B, C, H, W], within the region.

    Averaged over the heads; they sum to 1 at each position.

    Args:
        bank: the site's; with unmerged tokens it distinguishes references better.

    Returns:
        [B, 1 + references, H, W], the null token's share first.
    """
    layer = retrieval.sites[site]
    q = layer.query(h)
    q, k = (
        rearrange(t.float(), "g n (h d) -> g h n d", h=layer.heads)
        for t in (q.reshape(len(bank.keys), -1, q.shape[2]), bank.keys)
    )
    bias = 0.0 if bank.bias is None else bank.bias[:, None, None].float()
    owner = bank.owner.expand(len(k), -1)[:, None] + 1
    shares = q.new_zeros(len(k), q.shape[2], references + 1)
    at_once = max(1, _LOGITS // (k.shape[0] * k.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], at_once):
        logits = q[:, :, start : start + at_once] @ k.transpose(2, 3) / k.shape[3] ** 0.5
        weights = (logits + bias).softmax(-1).mean(1)
        index = owner.expand_as(weights)
        shares[:, start : start + at_once].scatter_add_(2, index, weights)
    shares = shares.view(len(h), -1, references + 1).transpose(1, 2)
    shares = unpool_queries(shares, h.shape[2:], layer.pool)
    if retrieval.region is None:
        return shares
    retrieved = shares[:, 1:] * resize_region(retrieval.region, h).to(shares)
    return torch.cat([1 - retrieved.sum(1, keepdim=True), retrieved], 1)


@dataclass(eq=False)
class RecordedRetrieval(Retrieval):
    """A `Retrieval` that also records the attention shares of the conditional rows at one site.

    The result is bit for bit that of `Retrieval`; the cost is one attention map of that site.

    Attributes:
        recorded: the site.
        shares: summed while sampling.
        seen: the site's bank with unmerged tokens (`measure_shares`); None for the bank's own.
    """

    recorded: str = "middle"
    shares: Shares = field(default_factory=Shares)
    seen: SiteBank | None = None

    def add_retrieved(
        self, site: str, h: Tensor, cond_or_uncond: Sequence[int], strength: float
    ) -> Tensor:
        if site == self.recorded:
            chunks = h.chunk(len(cond_or_uncond))
            rows = next((c for c, kind in zip(chunks, cond_or_uncond) if kind == COND), None)
            if rows is not None:
                bank = self.seen or self.bank.sites[site]
                references = int(bank.owner.max()) + 1
                self.shares.add(measure_shares(self, site, rows, bank, references))
        return super().add_retrieved(site, h, cond_or_uncond, strength)


def draw_overlay(pictures: Tensor, shares: Tensor, colours: Sequence[Sequence[float]]) -> Tensor:
    """Tints pictures [B, 3, H, W], in grey, with the colour of the strongest reference.

    Args:
        shares: [B, 1 + references, h, w], the null token's first (`Shares.mean`).
        colours: (r, g, b) in 0..1 for each reference.
    """
    smooth = F.interpolate(shares, size=pictures.shape[-2:], mode="bilinear", align_corners=False)
    confidence, index = smooth[:, 1:].max(1)
    palette = torch.tensor(colours, dtype=pictures.dtype, device=pictures.device)
    tint = palette[index].movedim(-1, 1)
    grey = pictures.mean(1, keepdim=True).expand_as(pictures)
    confidence = confidence.clamp(0, 1)
    strength = 0.25 + 0.45 * (confidence / confidence.amax((1, 2), keepdim=True).clamp_min(1e-8))
    return torch.lerp(grey, tint, strength[:, None])


def make_reference_masks(shares: Tensor, height: int, width: int, hard: bool) -> Tensor:
    """A mask of each reference, [B, references, H, W] in 0..1.

    Args:
        shares: see `draw_overlay`.
        hard: 1 at each position for the strongest reference, 0 for all where the null token has
            more than half; otherwise the shares themselves.
    """
    smooth = F.interpolate(shares, size=(height, width), mode="bilinear", align_corners=False)
    if not hard:
        return smooth[:, 1:].clamp(0, 1)
    best = F.one_hot(smooth[:, 1:].argmax(1), shares.shape[1] - 1).movedim(-1, 1)
    return (best * (smooth[:, :1] <= 0.5)).to(shares)
