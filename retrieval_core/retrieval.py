"""Retrieval at one site: cross-attention from the image to the bank, and a zero convolution (§4.2).

r = W_o softmax(q K^T / sqrt(d) + log w) V,   q = W_q LN(h),  K = W_k LN(f),  V = W_v LN(f)
h <- h + strength * gate(sigma) * region(x, y) * zero_conv(r)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .bank import SiteBank
from .unet import AttentionFunction, attention

_LOGITS = 1 << 24  # held at once where shares are read off


class RetrievalSite(nn.Module):
    """The layers of one site, for features of `channels` channels and `heads` attention heads.

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
        **kw: Any,
    ):
        super().__init__()
        ops = operations
        self.heads, self.attend = heads, attend
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

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, H * W, C] of reference features [R, C, H, W]."""
        tokens = self.norm_reference(features.flatten(2).transpose(1, 2))
        return self.to_k(tokens), self.to_v(tokens)

    def null(self) -> Tensor:
        """The null token's key, [C]."""
        index = torch.zeros(1, dtype=torch.long, device=self.null_key.weight.device)
        return self.null_key(index)[0]

    def forward(self, h: Tensor, bank: SiteBank) -> Tensor:
        """What the features h [B, C, H, W] retrieve from the bank, after the zero convolution.

        The bank's G banks serve B / G consecutive rows each. Rows that share a bank are folded
        into one long query, so that keys and values are never repeated.
        """
        batch, channels, height, width = h.shape
        out = self.to_out(self.attended(h, bank))
        return self.zero_conv(out.view(batch, height, width, channels).permute(0, 3, 1, 2))

    def attended(self, h: Tensor, bank: SiteBank) -> Tensor:
        """softmax(q K^T / sqrt(d) + log w) V of the features h [B, C, H, W]: [B, H * W, C]."""
        query = self._query(h, bank)
        out = self.attend(query, bank.keys, bank.values, self.heads, mask=_mask(bank.bias))
        return out.view(h.shape[0], -1, h.shape[1])

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
        batch, channels, height, width = h.shape
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
        return shares.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def attention_at(self, h: Tensor, bank: SiteBank, places: Tensor) -> Tensor:
        """Attention of some places, the mean of the heads: [G, Q, N], each row adding up to 1.

        Args:
            places: [Q] indices into the B / G * H * W places that each bank serves.
        """
        split = (self.heads, h.shape[1] // self.heads)
        query = self._query(h, bank)[:, places].unflatten(2, split).transpose(1, 2)
        keys = bank.keys.unflatten(2, split).transpose(1, 2)
        logits = query @ keys.transpose(2, 3) / split[1] ** 0.5
        if bank.bias is not None:
            logits = logits + bank.bias[:, None, None]
        return logits.softmax(-1).mean(1)

    def _query(self, h: Tensor, bank: SiteBank) -> Tensor:
        query = self.to_q(self.norm_query(h.flatten(2).transpose(1, 2)))
        return query.reshape(bank.keys.shape[0], -1, h.shape[1])


def _mask(bias: Tensor | None) -> Tensor | None:
    """A bias [G, N] as the attention functions take it: [G, 1, 1, N]."""
    return None if bias is None else bias[:, None, None]
