"""Retrieval at one site: cross-attention from the image to the bank, and a zero convolution (§4.2).

r = W_o softmax(q K^T / sqrt(d) + log w) V,   q = W_q LN(h),  K = W_k LN(f),  V = W_v LN(f)
h <- h + strength * gate(sigma) * region(x, y) * zero_conv(r)

This goes past the paper: a site may pool its queries, so that p x p places ask as one. What they
retrieve is laid out again by bilinear interpolation; keys and values keep every token. At the sites
of the finest level, where a step's cost is, that takes it to a fourth and less.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bank.site_bank import SiteBank
from .unet import AttentionFunction, UNetConfig, attention

_LOGITS = 1 << 24  # held at once where shares are read off


def query_pools(config: UNetConfig, pooling: int) -> dict[str, int]:
    """site -> `RetrievalSite.pool`: queries are pooled at the latent's own resolution only."""
    factors = config.site_downsampling()
    return {site: pooling if factor == 1 else 1 for site, factor in factors.items()}


class RetrievalSite(nn.Module):
    """The layers of one site, for features of `channels` channels and `heads` attention heads.

    `pool`: the edge in places of the squares that query as one, see the module; 1: each by itself.

    The null key is the weight of an embedding, not a bare parameter: hosts cast and offload layers.
    Nothing after the attention has a bias, so a place that retrieves only the null token, whose
    value is zero, is left exactly as it was.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        operations: Any = nn,
        attend: AttentionFunction = attention,
        pool: int = 1,
        **kw: Any,
    ):
        super().__init__()
        ops = operations
        self.heads, self.attend, self.pool = heads, attend, pool
        self.norm_query = ops.LayerNorm(channels, **kw)
        self.norm_reference = ops.LayerNorm(channels, **kw)
        self.to_q = ops.Linear(channels, channels, bias=False, **kw)
        self.to_k = ops.Linear(channels, channels, bias=False, **kw)
        self.to_v = ops.Linear(channels, channels, bias=False, **kw)
        self.to_out = ops.Linear(channels, channels, bias=False, **kw)
        self.null_key = ops.Embedding(1, channels, **kw)
        self.zero_conv = ops.Conv2d(channels, channels, 1, bias=False, **kw)

    def initialise(self, generator: torch.Generator) -> None:
        """Starts the site so that retrieval works by likeness and changes nothing.

        Queries and keys share one rotation, so that before any training a place attends to what
        looks like it; the zero convolution is zero, so that nothing reaches the image yet (§4.2).
        """
        channels = self.to_q.weight.shape[0]
        with torch.no_grad():
            for norm in (self.norm_query, self.norm_reference):
                norm.weight.fill_(1.0)
                norm.bias.zero_()
            for layer in (self.to_q, self.to_v, self.to_out):
                gauss = torch.randn(channels, channels, generator=generator)
                layer.weight.copy_(torch.linalg.qr(gauss).Q)
            self.to_k.weight.copy_(self.to_q.weight)
            self.null_key.weight.zero_()
            self.zero_conv.weight.zero_()

    def normed(self, tokens: Tensor) -> Tensor:
        """LN(f) of reference features f [..., N, C]."""
        return self.norm_reference(tokens)

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., N, C] of LN(f) [..., N, C]; both are linear in it."""
        return self.to_k(normed), self.to_v(normed)

    def null(self) -> Tensor:
        """The null token's key, [C], where and as the weights are kept."""
        return self.null_key.weight[0]

    def forward(self, h: Tensor, bank: SiteBank) -> Tensor:
        """What the features h [B, C, H, W] retrieve from the bank, after the zero convolution.

        The bank's G banks serve B / G consecutive rows each. Rows that share a bank are folded
        into one long query, so that keys and values are never repeated.
        """
        out = self.to_out(self.attended(h, bank))
        return self.zero_conv(out.transpose(1, 2).unflatten(2, h.shape[-2:]))

    def attended(self, h: Tensor, bank: SiteBank) -> Tensor:
        """softmax(q K^T / sqrt(d) + log w) V of the features h [B, C, H, W]: [B, H * W, C]."""
        found = self.attended_pooled(h, bank).transpose(1, 2)
        return self.spread(found, h).flatten(2).transpose(1, 2)

    def attended_pooled(self, h: Tensor, bank: SiteBank, asked: Tensor | None = None) -> Tensor:
        """The same before it is laid out again: [B, Q, C], one token a query.

        Args:
            asked: [Q] indices of the queries wanted (`regions.queries_in`), None for all.
        """
        query = self._query(h, bank, asked)
        out = self.attend(query, bank.keys, bank.values, self.heads, mask=_mask(bank.bias))
        return out.view(h.shape[0], -1, h.shape[1])

    def grid(self, h: Tensor) -> tuple[int, int]:
        """Rows and columns of the queries of the features h [B, C, H, W]."""
        height, width = h.shape[-2:]
        return -(-height // self.pool), -(-width // self.pool)

    def spread(self, found: Tensor, h: Tensor, asked: Tensor | None = None) -> Tensor:
        """What queries found [B, C, Q], over the places of h [B, *, H, W]: [B, C, H, W].

        Linear maps of the channels may be applied before or after alike.

        Args:
            asked: the queries that found it, see `attended_pooled`; the others found zeros.
        """
        (rows, columns), (height, width) = self.grid(h), h.shape[-2:]
        if asked is not None:
            everywhere = found.new_zeros(*found.shape[:2], rows * columns)
            everywhere[:, :, asked] = found
            found = everywhere
        pooled = found.unflatten(2, (rows, columns))
        if self.pool == 1:
            return pooled
        wide = F.interpolate(pooled, scale_factor=float(self.pool), mode="bilinear")
        return wide[..., :height, :width]

    def output_matrix(self, like: Tensor) -> Tensor:
        """zero_conv W_o as one matrix [C, C]: two linear maps with nothing between them.

        It is found by sending the unit vectors through the layers, so that a host's layers cast
        and offload as ever. On the device and of the type of `like`.
        """
        channels = self.to_out.weight.shape[0]
        columns = self.to_out(torch.eye(channels, dtype=like.dtype, device=like.device)[None])
        return self.zero_conv(columns.transpose(1, 2)[..., None])[0, :, :, 0]

    def shares(self, h: Tensor, bank: SiteBank, references: int) -> Tensor:
        """Where each place looks: [B, 1 + references, H, W], the null token's share first.

        Attention is averaged over the heads; the shares of one place add up to 1.
        """
        batch, channels = h.shape[:2]
        dim = channels // self.heads
        query = self._query(h, bank).unflatten(2, (self.heads, dim)).transpose(1, 2).float()
        keys = bank.keys.unflatten(2, (self.heads, dim)).transpose(1, 2).float().transpose(2, 3)
        bias = 0.0 if bank.bias is None else bank.bias[:, None, None].float()
        owner = bank.owner.expand(len(keys), -1)[:, None] + 1
        shares = query.new_zeros(len(keys), query.shape[2], references + 1)
        at_once = max(1, _LOGITS // (len(keys) * self.heads * keys.shape[-1]))
        for start in range(0, query.shape[2], at_once):
            part = slice(start, start + at_once)
            weights = (query[:, :, part] @ keys / dim**0.5 + bias).softmax(-1).mean(1)
            shares[:, part].scatter_add_(2, owner.expand_as(weights), weights)
        return self.spread(shares.view(batch, -1, references + 1).transpose(1, 2), h)

    def attention_at(self, h: Tensor, bank: SiteBank, places: Tensor) -> Tensor:
        """Attention of some places, the mean of the heads: [G, Q, N], each row adding up to 1.

        Args:
            places: [Q] indices into the B / G * H * W places that each bank serves.
        """
        split = (self.heads, h.shape[1] // self.heads)
        query = self._query(h, bank)[:, self._queries_of(places, h)]
        query = query.unflatten(2, split).transpose(1, 2)
        keys = bank.keys.unflatten(2, split).transpose(1, 2)
        logits = query @ keys.transpose(2, 3) / split[1] ** 0.5
        if bank.bias is not None:
            logits = logits + bank.bias[:, None, None]
        return logits.softmax(-1).mean(1)

    def _queries_of(self, places: Tensor, h: Tensor) -> Tensor:
        """Which queries places of the features h are part of."""
        (rows, columns), (height, width) = self.grid(h), h.shape[-2:]
        row, y, x = places // (height * width), places // width % height, places % width
        return (row * rows + y // self.pool) * columns + x // self.pool

    def _query(self, h: Tensor, bank: SiteBank, asked: Tensor | None = None) -> Tensor:
        if self.pool > 1:
            h = F.avg_pool2d(h, self.pool, ceil_mode=True, count_include_pad=False)
        tokens = h.flatten(2).transpose(1, 2)
        query = self.to_q(self.norm_query(tokens if asked is None else tokens[:, asked]))
        return query.reshape(bank.keys.shape[0], -1, h.shape[1])


def _mask(bias: Tensor | None) -> Tensor | None:
    """A bias [G, N] as the attention functions take it: [G, 1, 1, N]."""
    return None if bias is None else bias[:, None, None]
