"""Retrieval at one site: cross-attention from the image to the bank, and a zero convolution (§4.2).

r = W_o softmax(q K^T / sqrt(d) + log w) V,   q = W_q LN(h),  K = W_k LN(f),  V = W_v LN(f)
h <- h + strength * gate(sigma) * region(x, y) * zero_conv(r)

Keys and values of all references are computed once (`bank.site_bank`). Beyond the paper, a site may
pool its queries: each p x p block of positions shares one query, and the retrieved values are
interpolated bilinearly. At the full-resolution sites, where most of a step's cost is, p = 2 cuts
that cost to a fourth.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .unet import AttentionFunction, UNetConfig, attention


def choose_query_pools(config: UNetConfig, pooling: int) -> dict[str, int]:
    """site -> query pooling factor: `pooling` at full-resolution sites, 1 elsewhere."""
    factors = config.site_downsampling()
    return {site: pooling if factor == 1 else 1 for site, factor in factors.items()}


def pool_queries(h: Tensor, pool: int, active: Tensor | None = None) -> Tensor:
    """Features [B, C, H, W] as query tokens [B, Q, C], averaged over pool x pool blocks.

    Args:
        active: [Q] indices of the query tokens to return (`regions.find_active`), None for all.
    """
    if pool > 1:
        h = F.avg_pool2d(h, pool, ceil_mode=True, count_include_pad=False)
    tokens = h.flatten(2).transpose(1, 2)
    return tokens if active is None else tokens[:, active]


def unpool_queries(
    retrieved: Tensor, size: tuple[int, int], pool: int, active: Tensor | None = None
) -> Tensor:
    """The inverse layout of `pool_queries`: [B, C, Q] to [B, C, H, W], interpolated bilinearly.

    Args:
        size: (H, W). active: the query tokens that `retrieved` holds; the others are zeros.
    """
    height, width = size
    rows, columns = -(-height // pool), -(-width // pool)
    if active is not None:
        everywhere = retrieved.new_zeros(*retrieved.shape[:2], rows * columns)
        everywhere[:, :, active] = retrieved
        retrieved = everywhere
    pooled = retrieved.unflatten(2, (rows, columns))
    if pool == 1:
        return pooled
    wide = F.interpolate(pooled, scale_factor=float(pool), mode="bilinear")
    return wide[..., :height, :width]


def cross_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    heads: int,
    attend: AttentionFunction = attention,
) -> Tensor:
    """softmax(q K^T / sqrt(d) + bias) V for queries [B, Q, C].

    Rows that share keys are folded into one long query, so that keys are never repeated.

    Args:
        keys, values: [G, N, C]; each of the G serves B / G consecutive rows. bias: [G, N] or None.
    """
    folded = q.reshape(len(keys), -1, q.shape[2])
    mask = None if bias is None else bias[:, None, None]
    return attend(folded, keys, values, heads, mask=mask).view_as(q)


class RetrievalSite(nn.Module):
    """Retrieval layers of one site with features of `channels` channels.

    Nothing after the attention has a bias, so a position that retrieves only the null token, whose
    value is zero, does not change. The null key is the weight of an embedding, not a bare
    parameter: hosts cast and offload layers.

    Args:
        pool: query pooling factor.
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
        self.channels, self.heads, self.attend, self.pool = channels, heads, attend, pool
        self.norm_query = ops.LayerNorm(channels, **kw)
        self.norm_reference = ops.LayerNorm(channels, **kw)
        self.to_q = ops.Linear(channels, channels, bias=False, **kw)
        self.to_k = ops.Linear(channels, channels, bias=False, **kw)
        self.to_v = ops.Linear(channels, channels, bias=False, **kw)
        self.to_out = ops.Linear(channels, channels, bias=False, **kw)
        self.null_key = ops.Embedding(1, channels, **kw)
        self.zero_conv = ops.Conv2d(channels, channels, 1, bias=False, **kw)

    def initialise(self, generator: torch.Generator) -> None:
        """Initialises the weights for training.

        Queries and keys share one rotation, so that a position attends to similar features before
        any training; the zero convolution is zero, so that nothing reaches the image yet (§4.2).
        """
        with torch.no_grad():
            for norm in (self.norm_query, self.norm_reference):
                norm.weight.fill_(1.0)
                norm.bias.zero_()
            for layer in (self.to_q, self.to_v, self.to_out):
                gauss = torch.randn(self.channels, self.channels, generator=generator)
                layer.weight.copy_(torch.linalg.qr(gauss).Q)
            self.to_k.weight.copy_(self.to_q.weight)
            self.null_key.weight.zero_()
            self.zero_conv.weight.zero_()

    def forward(
        self, h: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """zero_conv(r) of the features h [B, C, H, W]; the others: see `cross_attention`."""
        q = self.query(h)
        r = self.to_out(cross_attention(q, keys, values, bias, self.heads, self.attend))
        return self.zero_conv(unpool_queries(r.transpose(1, 2), h.shape[2:], self.pool))

    def query(self, h: Tensor) -> Tensor:
        """q [B, Q, C] of the features h [B, C, H, W]."""
        return self.to_q(self.norm_query(pool_queries(h, self.pool)))

    def embed_null(self, like: Tensor) -> Tensor:
        """The null token's key [1, C], on the device and of the type of `like`."""
        return self.null_key(torch.zeros(1, dtype=torch.long, device=like.device)).to(like)
