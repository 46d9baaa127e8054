"""Keeps regions apart: in the base's self-attention no character looks at another.

A base model's self-attention spans the whole picture, and takes hair and eyes of one figure over to
the other while both take shape. Here a place that belongs to a region attends to that region and
to what belongs to none; places of none attend to everything (Bounded Attention, arXiv 2403.16990,
without its guidance). It costs less than the attention it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import RetrievalError
from ..network.unet import Attention, SelfAttentionHook
from .regions import region_at

SHARED = -1
_OWNED = 0.5  # a place belongs to a region that fills more of it than this

# Pairs (places, what they attend to) of indices [n] and [m] into a layer's places.
Partition = list[tuple[Tensor, Tensor]]
# (q [B, n, D], k [B, m, D], v [B, m, D], places [n]) -> [B, n, D]
PartAttention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def check_apart(apart: float) -> float:
    """The part of sampling in which regions are kept apart; RetrievalError outside 0..1."""
    if not (math.isfinite(apart) and 0 <= apart <= 1):
        raise RetrievalError(
            f"Regions are to be kept apart until {apart:g} of sampling; give a number from 0 "
            "(never) to 1 (to the end)."
        )
    return apart


def owners(regions: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """[H * W]: the index of the region that each place belongs to, `SHARED` for none.

    Where regions overlap the stronger one has the place, and neither where they are equal.

    Args:
        regions: of 0..1 over the picture, [h, w] each of any size. size: (H, W) of the layer.
    """
    like = regions[0].new_empty(1, 1, *size, dtype=torch.float32)
    shares = torch.stack([region_at(region, like).flatten() for region in regions])
    most, owner = shares.max(0)
    tied = (shares == most).sum(0) > 1
    return owner.masked_fill((most <= _OWNED) | tied, SHARED)


def partition(regions: Sequence[Tensor], size: tuple[int, int]) -> Partition | None:
    """What each place of a layer may attend to; None where fewer than two regions have a place."""
    if len(regions) < 2:
        return None
    owner = owners(regions, size)
    present = owner.unique().tolist()
    if len(present) - (SHARED in present) < 2:
        return None
    parts = []
    for index in present:
        mine = owner == index
        seen = torch.ones_like(mine) if index == SHARED else mine | (owner == SHARED)
        parts.append((mine.nonzero()[:, 0], seen.nonzero()[:, 0]))
    return parts


def attend_apart(
    attend: PartAttention, q: Tensor, k: Tensor, v: Tensor, parts: Partition
) -> Tensor:
    """Self-attention [B, N, D] of a layer whose places attend to their part only."""
    out = torch.empty_like(q)
    for places, seen in parts:
        out[:, places] = attend(q[:, places], k[:, seen], v[:, seen], places)
    return out


def isolation_hook(regions: Sequence[Tensor]) -> SelfAttentionHook | None:
    """A U-Net's `self_attention` hook that keeps the regions apart; None for fewer than two."""
    if len(regions) < 2:
        return None
    known: dict[tuple[int, int], Partition | None] = {}

    def hook(
        layer: Attention, size: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, heads: int
    ) -> Tensor:
        if size not in known:
            known[size] = partition([region.to(q.device) for region in regions], size)
        parts = known[size]
        if parts is None:
            return layer.attend(q, k, v, heads)
        return attend_apart(lambda q, k, v, _: layer.attend(q, k, v, heads), q, k, v, parts)

    return hook
