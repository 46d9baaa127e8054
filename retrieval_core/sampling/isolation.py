"""Keeps regions apart: in the base's self-attention no character looks at another.

A base model's self-attention spans the whole picture, and takes hair and eyes of one figure over to
the other while both take shape. Here a position that belongs to a region attends to that region and
to what belongs to none; positions of none attend to everything (Bounded Attention, arXiv
2403.16990, without its guidance). It costs less than the attention it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import RetrievalError
from ..network.unet import AttentionFunction
from .joint_attention import Source, attend_chunks
from .regions import resize_region

SHARED = -1
_OWNED = 0.5  # a position belongs to a region that fills more of it than this

# Pairs (positions, what they attend to) of indices [n] and [m] into a layer's positions.
Partition = list[tuple[Tensor, Tensor]]


def check_apart(apart: float) -> float:
    """The part of sampling in which regions are kept apart; RetrievalError outside 0..1."""
    if not (math.isfinite(apart) and 0 <= apart <= 1):
        raise RetrievalError(
            f"Regions are to be kept apart until {apart:g} of sampling; give a number from 0 "
            "(never) to 1 (to the end)."
        )
    return apart


def assign_owners(regions: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """[H * W]: the index of the region that each position belongs to, `SHARED` for none.

    Where regions overlap the stronger one has the position, and neither where they are equal.

    Args:
        regions: of 0..1 over the picture, [h, w] each of any size. size: (H, W) of the layer.
    """
    like = regions[0].new_empty(1, 1, *size, dtype=torch.float32)
    shares = torch.stack([resize_region(region, like).flatten() for region in regions])
    most, owner = shares.max(0)
    tied = (shares == most).sum(0) > 1
    return owner.masked_fill((most <= _OWNED) | tied, SHARED)


def partition(regions: Sequence[Tensor], size: tuple[int, int]) -> Partition | None:
    """What each position of a layer may attend to; None where fewer than two regions have one."""
    if len(regions) < 2:
        return None
    owner = assign_owners(regions, size)
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
    attend: AttentionFunction,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    chunks: Sequence[Sequence[Source]],
    partitions: Sequence[Partition | None],
) -> Tensor:
    """`attend_chunks` with a partition of the positions for each chunk, or None for none."""
    if not any(partitions):
        return attend_chunks(attend, q, k, v, heads, chunks)
    if any(part is not partitions[0] for part in partitions):  # crops of the picture differ
        rows = zip(*(t.chunk(len(chunks)) for t in (q, k, v)), chunks, partitions, strict=True)
        return torch.cat(
            [attend_apart(attend, *qkv, heads, [own], [part]) for *qkv, own, part in rows]
        )
    out = torch.empty_like(q)
    for positions, seen in partitions[0] or []:
        # One object for one source: chunks that share theirs are attended to at once.
        here = {id(s): s.at(positions) for sources in chunks for s in sources}
        cut = [[here[id(s)] for s in sources] for sources in chunks]
        out[:, positions] = attend_chunks(
            attend, q[:, positions], k[:, seen], v[:, seen], heads, cut
        )
    return out
