"""Attention shares of each reference in joint self-attention, for the retrieval map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..sampling.joint_attention import Source
from .attention_layers import Layer

_LOGITS = 1 << 24  # most attention logits in memory at once


def choose_map_layer(layers: Mapping[str, Layer], chosen: Sequence[str]) -> str:
    """The layer that the map is measured at: the last of the coarsest outside the middle block,
    where a position is a part of a figure and attention costs least.
    """
    outside = [name for name in chosen if not name.startswith("middle")] or list(chosen)
    coarsest = max(layers[name].downsampling for name in outside)
    return [name for name in outside if layers[name].downsampling == coarsest][-1]


def measure_joint_shares(
    q: Tensor, k: Tensor, heads: int, source: Source, owner: Tensor, references: int
) -> Tensor:
    """Attention shares [B, N, 1 + references] of the layer's own tokens and of each reference's.

    Averaged over the heads; they sum to 1 at each position. Outside the source's region all of it
    is the own tokens'.

    Args:
        q, k: the layer's own [B, N, D]. source: of one bank (G = 1).
        owner: [M] index of the reference that each of the bank's tokens belongs to.
    """
    dim = q.shape[-1] // heads
    query, own, bank = (
        t.float().unflatten(-1, (heads, dim)).transpose(1, 2) for t in (q, k, source.keys[:1])
    )
    bias = 0.0 if source.bias is None else source.bias[:1, None, None].float()
    shares = query.new_zeros(len(q), q.shape[1], 1 + references)
    at_once = max(1, _LOGITS // (len(q) * heads * (own.shape[2] + bank.shape[2])))
    for start in range(0, q.shape[1], at_once):
        part = query[:, :, start : start + at_once] / dim**0.5
        within = (part @ own.transpose(2, 3)).logsumexp(-1, keepdim=True)
        logits = part @ bank.transpose(2, 3) + bias
        total = torch.logaddexp(within, logits.logsumexp(-1, keepdim=True))
        weights = (logits - total).exp().mean(1)
        index = (owner + 1).expand_as(weights)
        shares[:, start : start + at_once].scatter_add_(2, index, weights)
    if source.region is not None:
        shares = shares * source.region.to(shares)[:, None]
    shares[..., 0] = 1 - shares[..., 1:].sum(-1)
    return shares
