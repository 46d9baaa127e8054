"""Isolation of regions: in the base's self-attention no character attends to another.

A base model's self-attention spans the whole picture and mixes hair and eyes of two figures while
both take shape. With isolation, positions of a region attend to that region and to positions of
none; positions of none attend to all (Bounded Attention, arXiv 2403.16990, without its guidance).
It costs less than full self-attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..network.unet import AttentionFunction
from .joint_attention import Source, attend_chunks
from .regions import resize_region

SHARED = -1
_OWNED = 0.5  # a position belongs to a region that covers more of it than this

# Pairs of indices into a layer's positions: queries [n], and the keys [m] that they attend to.
Partition = list[tuple[Tensor, Tensor]]


def assign_owners(regions: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """[H * W]: the index of the region that each position belongs to, `SHARED` for none.

    Where regions overlap the one that covers more owns the position; neither where they tie.

    Args:
        regions: of 0..1 over the picture, [h, w] each of any size. size: (H, W) of the layer.
    """
    like = regions[0].new_empty(1, 1, *size, dtype=torch.float32)
    coverage = torch.stack([resize_region(region, like).flatten() for region in regions])
    most, owner = coverage.max(0)
    tied = (coverage == most).sum(0) > 1
    return owner.masked_fill((most <= _OWNED) | tied, SHARED)


def partition(regions: Sequence[Tensor], size: tuple[int, int]) -> Partition | None:
    """Groups positions by what they attend to; None where fewer than two regions own any."""
    if len(regions) < 2:
        return None
    owner = assign_owners(regions, size)
    present = owner.unique().tolist()
    if len(present) - (SHARED in present) < 2:
        return None
    groups = []
    for index in present:
        queries = owner == index
        keys = torch.ones_like(queries) if index == SHARED else queries | (owner == SHARED)
        groups.append((queries.nonzero()[:, 0], keys.nonzero()[:, 0]))
    return groups


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
    if any(other is not partitions[0] for other in partitions):  # crops of the picture differ
        rows = zip(*(t.chunk(len(chunks)) for t in (q, k, v)), chunks, partitions, strict=True)
        return torch.cat(
            [attend_apart(attend, *qkv, heads, [own], [its]) for *qkv, own, its in rows]
        )
    out = torch.empty_like(q)
    for queries, keys in partitions[0] or []:
        # `attend_chunks` joins chunks by the identity of their sources: each is cut to size once.
        here = {id(s): s.at(queries) for sources in chunks for s in sources}
        cut = [[here[id(s)] for s in sources] for sources in chunks]
        out[:, queries] = attend_chunks(attend, q[:, queries], k[:, keys], v[:, keys], heads, cut)
    return out
