"""Retrieval sites for sampling: the query side as plain tensors, so that a step calls no layer.

A host may move layers' weights at any time, also while sampling. A site's query side is small
enough to be read once before sampling and copied to every device that samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bank.site_bank import SiteBank
from ..network.controlnet import RetrievalControlNet
from ..network.retrieval_site import RetrievalSite, cross_attention, pool_queries, unpool_queries
from ..network.unet import AttentionFunction

# A layer's weight and bias (None without one).
ReadWeights = Callable[[nn.Module], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class SiteRegion:
    """A region at one site.

    Attributes:
        mask: [1, 1, H, W] in 0..1.
        active: indices [Q] of the queries that it needs (`find_active`); None for all of them.
    """

    mask: Tensor
    active: Tensor | None = None


@dataclass(frozen=True, eq=False)
class FrozenSite:
    """The query side of a `RetrievalSite`.

    Attributes:
        norm: weight and bias of the query's LayerNorm, [2, C]. to_q: W_q, [C, C].
        to_out: zero_conv W_o as one matrix, [C, C].
        heads, attend, pool: the site's.
    """

    norm: Tensor
    to_q: Tensor
    to_out: Tensor
    heads: int
    attend: AttentionFunction
    pool: int

    def to(self, device: torch.device | str, dtype: torch.dtype) -> FrozenSite:
        norm, to_q, to_out = (t.to(device, dtype) for t in (self.norm, self.to_q, self.to_out))
        return replace(self, norm=norm, to_q=to_q, to_out=to_out)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.norm, self.to_q, self.to_out))

    def query(self, h: Tensor, active: Tensor | None = None) -> Tensor:
        """Projects features h [B, C, H, W] to queries [B, Q, C]; `active`: see `pool_queries`."""
        weight, bias = self.norm
        tokens = pool_queries(h, self.pool, active)
        return F.linear(F.layer_norm(tokens, weight.shape, weight, bias), self.to_q)

    def add_retrieved(
        self, h: Tensor, bank: SiteBank, strength: float, region: SiteRegion | None = None
    ) -> Tensor:
        """h + strength * region * zero_conv(r) for the features h [B, C, H, W]."""
        active = None if region is None else region.active
        if active is not None and not len(active):
            return h
        q = self.query(h, active)
        found = cross_attention(q, bank.keys, bank.values, bank.bias, self.heads, self.attend)
        found, to_out = found.transpose(1, 2), self.to_out.expand(len(h), -1, -1)
        if self.pool == 1 and active is None:
            # The product with W_o and the sum with h in one pass over memory.
            found = found if region is None else found * region.mask.flatten(2)
            return torch.baddbmm(h.flatten(2), to_out, found, alpha=strength).view_as(h)
        retrieved = unpool_queries(to_out @ found, h.shape[2:], self.pool, active)
        retrieved = retrieved if region is None else retrieved * region.mask
        return torch.add(h, retrieved, alpha=strength)


@torch.no_grad()
def freeze_site(site: RetrievalSite, read_weights: ReadWeights) -> FrozenSite:
    """Builds a site's query side; the product of matrices is computed in float32 or wider."""
    norm = torch.stack([t for t in read_weights(site.norm_query) if t is not None])
    to_q, zero_conv, to_out = (
        read_weights(layer)[0] for layer in (site.to_q, site.zero_conv, site.to_out)
    )
    wide = torch.promote_types(to_out.dtype, torch.float32)
    product = zero_conv[:, :, 0, 0].to(wide) @ to_out.to(wide)
    return FrozenSite(norm, to_q, product.to(to_q), site.heads, site.attend, site.pool)


def freeze_sites(
    network: RetrievalControlNet, read_weights: ReadWeights | None = None
) -> dict[str, FrozenSite]:
    """Builds site -> query side.

    Args:
        read_weights: reads a layer's weights where a host manages them; None: from the layer.
    """
    read = read_weights or (lambda layer: (layer.weight.detach(), layer.bias))
    return {name: freeze_site(site, read) for name, site in network.retrieval.items()}
