"""Joint self-attention: a layer's own tokens and a bank's, in one softmax.

joint = softmax([q K^T / sqrt(d), q K_bank^T / sqrt(d) + log w + log strength]) [V, V_bank]:
strength 1 is plain attention over both, a small one looks at the bank seldom, a large one almost
always. With regions r_i(x, y) and several banks,

out = own + sum_i r_i (joint_i - own),

so that a position outside a region has not seen its bank. Where regions overlap, so that together
they exceed 1, they are scaled down to a sum of 1: equal banks count as one.

With AdaIN (arXiv 1703.06868, eq. 8) the own values first take on the mean and deviation, by
channel, of the bank's. Keys are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..network.unet import AttentionFunction

_LEAST_DEVIATION = 1e-5


@dataclass(frozen=True, eq=False)
class Source:
    """One bank as one layer attends to it.

    Attributes:
        keys, values: [G, M, D]; each of the G banks serves B / G consecutive rows.
        bias: additive on the logits of the bank's tokens, [G, M], or None for none.
        region: [N] of 0..1 over the layer's own positions, or None for everywhere.
        adain: match the statistics of the own values to the bank's.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None = None
    region: Tensor | None = None
    adain: bool = False

    def at(self, positions: Tensor) -> Source:
        """The same for some of the layer's positions, [n] indices."""
        return self if self.region is None else replace(self, region=self.region[positions])


def attend_chunks(
    attend: AttentionFunction,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    chunks: Sequence[Sequence[Source]],
) -> Tensor:
    """Self-attention of a batch whose rows fall into equal chunks, each with sources of its own.

    Args:
        attend: attention function, see `unet.attention`.
        q, k, v: [B, N, D]; B is a multiple of the number of chunks.
        chunks: the sources of each chunk; none is the layer's own attention, unchanged.
    """
    if not any(chunks):
        return attend(q, k, v, heads)
    alike: dict[tuple, list[int]] = {}
    for i, sources in enumerate(chunks):
        # A batch of banks serves runs of rows in order, so such chunks are not joined.
        apart = i if any(len(source.keys) > 1 for source in sources) else None
        alike.setdefault((apart, *map(id, sources)), []).append(i)
    if len(alike) == 1:
        return attend_to(attend, q, k, v, heads, chunks[0])
    parts = [tensor.chunk(len(chunks)) for tensor in (q, k, v)]
    out: list[Tensor] = [q] * len(chunks)
    for members in alike.values():
        rows = (torch.cat([part[i] for i in members]) for part in parts)
        done = attend_to(attend, *rows, heads, chunks[members[0]])
        for i, piece in zip(members, done.chunk(len(members)), strict=True):
            out[i] = piece
    return torch.cat(out)


def attend_to(
    attend: AttentionFunction,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    sources: Sequence[Source],
) -> Tensor:
    """Self-attention of rows that share their sources: [B, N, D]; see the module's formula.

    Each position is only computed where it counts: inside a region with the bank, outside without.
    """
    if not sources:
        return attend(q, k, v, heads)
    if len(sources) == 1 and sources[0].region is None:
        return _joint(attend, q, k, v, heads, sources[0])
    everywhere = q.new_ones(q.shape[1])
    regions = torch.stack([everywhere if s.region is None else s.region.to(q) for s in sources])
    regions = regions / regions.sum(0).clamp_min(1)
    own = (1 - regions.sum(0)).clamp_min(0)
    out = torch.zeros_like(q)
    inside = own.nonzero()[:, 0]
    if len(inside):
        out[:, inside] += own[inside, None] * attend(q[:, inside], k, v, heads)
    for source, region in zip(sources, regions, strict=True):
        inside = region.nonzero()[:, 0]
        if len(inside):
            joint = _joint(attend, q[:, inside], k, v, heads, source)
            out[:, inside] += region[inside, None] * joint
    return out


def _joint(
    attend: AttentionFunction, q: Tensor, k: Tensor, v: Tensor, heads: int, source: Source
) -> Tensor:
    rows, tokens, _ = k.shape
    if source.adain:
        v = _matched(v, source.values, source.bias)
    keys = torch.cat([k, _for_rows(source.keys, rows)], 1)
    values = torch.cat([v, _for_rows(source.values, rows)], 1)
    if source.bias is None:
        return attend(q, keys, values, heads)
    mask = torch.cat([source.bias.new_zeros(len(source.bias), tokens), source.bias], 1)
    if len(mask) > 1:
        mask = mask.repeat_interleave(rows // len(mask), 0)
    return attend(q, keys, values, heads, mask=mask[:, None, None].to(q))


def _matched(own: Tensor, banks: Tensor, bias: Tensor | None) -> Tensor:
    """Tokens [B, N, D] with the mean and deviation of the bank's [G, M, D] in every channel.

    A bank's tokens count as they do in the softmax: by exp(bias).
    """
    wide = torch.promote_types(own.dtype, torch.float32)
    tokens, banks = own.to(wide), banks.to(wide)
    shares = banks.new_ones(banks.shape[:2]) if bias is None else bias.to(wide).exp()
    shares = (shares / shares.sum(1, keepdim=True))[..., None]
    mean = (shares * banks).sum(1, keepdim=True)
    deviation = (shares * (banks - mean).square()).sum(1, keepdim=True).sqrt()
    mean, deviation = _for_rows(mean, len(own)), _for_rows(deviation, len(own))
    spread = tokens.std(1, keepdim=True, correction=0) + _LEAST_DEVIATION
    return ((tokens - tokens.mean(1, keepdim=True)) / spread * deviation + mean).to(own)


def _for_rows(banks: Tensor, rows: int) -> Tensor:
    """[G, M, D] as [rows, M, D]; each bank for rows / G consecutive rows."""
    if len(banks) == 1:
        return banks.expand(rows, -1, -1)
    return banks.repeat_interleave(rows // len(banks), 0)
