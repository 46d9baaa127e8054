"""Joint self-attention: a layer's own tokens and a bank's, in one softmax.

joint = softmax([q K^T / sqrt(d), q K_bank^T / sqrt(d) + log w + log strength]) [V, V_bank]:
strength 1 is plain attention over both, a small one rarely attends to the bank, a large one almost
always. With regions r_i(x, y) and several banks,

out = own + sum_i r_i (joint_i - own),

so that no position outside a region depends on its bank. Where overlapping regions sum to more than
1, they are scaled down to a sum of 1: equal banks count as one.

AdaIN (arXiv 1703.06868, eq. 8) first gives the own values the mean and deviation of the bank's
values, per channel. Keys are unchanged.
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
    """One bank at one layer.

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
        """The same at some of the layer's positions, indices [n]."""
        return self if self.region is None else replace(self, region=self.region[positions])


def attend_chunks(
    attend: AttentionFunction,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    chunks: Sequence[Sequence[Source]],
) -> Tensor:
    """Self-attention of a batch of equal chunks of rows, each chunk with a list of sources.

    Args:
        attend: attention function, see `unet.attention`.
        q, k, v: [B, N, D]; B is a multiple of the number of chunks.
        chunks: the sources of each chunk; without any it is the layer's own attention, unchanged.
    """
    if not any(chunks):
        return attend(q, k, v, heads)
    alike: dict[tuple, list[int]] = {}
    for i, sources in enumerate(chunks):
        # Several banks serve runs of rows within a chunk, so that such chunks cannot be joined.
        unjoined = i if any(len(source.keys) > 1 for source in sources) else None
        alike.setdefault((unjoined, *map(id, sources)), []).append(i)
    if len(alike) == 1:
        return attend_to(attend, q, k, v, heads, chunks[0])
    qkv = [tensor.chunk(len(chunks)) for tensor in (q, k, v)]
    out: list[Tensor] = [q] * len(chunks)
    for members in alike.values():
        rows = (torch.cat([chunked[i] for i in members]) for chunked in qkv)
        attended = attend_to(attend, *rows, heads, chunks[members[0]])
        for i, chunk in zip(members, attended.chunk(len(members)), strict=True):
            out[i] = chunk
    return torch.cat(out)


def attend_to(
    attend: AttentionFunction,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    sources: Sequence[Source],
) -> Tensor:
    """Self-attention [B, N, D] of rows with the same sources; see the module's formula.

    Attends to a bank only at positions inside its region, and to own tokens alone only elsewhere.
    """
    if not sources:
        return attend(q, k, v, heads)
    if len(sources) == 1 and sources[0].region is None:
        return _attend_jointly(attend, q, k, v, heads, sources[0])
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
            joint = _attend_jointly(attend, q[:, inside], k, v, heads, source)
            out[:, inside] += region[inside, None] * joint
    return out


def _attend_jointly(
    attend: AttentionFunction, q: Tensor, k: Tensor, v: Tensor, heads: int, source: Source
) -> Tensor:
    rows, tokens, _ = k.shape
    if source.adain:
        v = _match_statistics(v, source.values, source.bias)
    keys = torch.cat([k, repeat_banks(source.keys, rows)], 1)
    values = torch.cat([v, repeat_banks(source.values, rows)], 1)
    if source.bias is None:
        return attend(q, keys, values, heads)
    mask = torch.cat([source.bias.new_zeros(len(source.bias), tokens), source.bias], 1)
    if len(mask) > 1:
        mask = mask.repeat_interleave(rows // len(mask), 0)
    return attend(q, keys, values, heads, mask=mask[:, None, None].to(q))


def _match_statistics(own: Tensor, banks: Tensor, bias: Tensor | None) -> Tensor:
    """Gives tokens [B, N, D] the mean and deviation, per channel, of the banks' [G, M, D].

    A bank's tokens are weighted by exp(bias), as in the softmax.
    """
    wide = torch.promote_types(own.dtype, torch.float32)
    tokens, banks = own.to(wide), banks.to(wide)
    weights = banks.new_ones(banks.shape[:2]) if bias is None else bias.to(wide).exp()
    weights = (weights / weights.sum(1, keepdim=True))[..., None]
    mean = (weights * banks).sum(1, keepdim=True)
    deviation = (weights * (banks - mean).square()).sum(1, keepdim=True).sqrt()
    mean, deviation = repeat_banks(mean, len(own)), repeat_banks(deviation, len(own))
    spread = tokens.std(1, keepdim=True, correction=0) + _LEAST_DEVIATION
    return ((tokens - tokens.mean(1, keepdim=True)) / spread * deviation + mean).to(own)


def repeat_banks(banks: Tensor, rows: int) -> Tensor:
    """Repeats [G, M, D] to [rows, M, D]; each bank serves rows / G consecutive rows."""
    if len(banks) == 1:
        return banks.expand(rows, -1, -1)
    return banks.repeat_interleave(rows // len(banks), 0)
