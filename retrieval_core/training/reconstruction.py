"""The reconstruction loss: retrieved values must predict the features of the clean target.

This goes past the paper. The diffusion loss reaches values and attention only through the decoder,
and teaches them slowly what of a reference is worth to retrieve. Here a linear layer at each site
predicts, from what a position retrieves, the features that the frozen base has of the target
without noise at that position. Where there are part labels, positions of the figure count;
otherwise all of the picture's. The layers are only used in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bank.site_bank import Bank, SiteBank
from ..network.retrieval_site import RetrievalSite, cross_attention, unpool_queries


class FeatureReader(nn.Module):
    """Linear predictors of the target's normalised features at all sites.

    They start as the inverse of fresh value projections, which are rotations: then they predict the
    mean of the normalised reference features that a position attends to.
    """

    def __init__(self, sites: Mapping[str, RetrievalSite]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {name: nn.Linear(site.channels, site.channels) for name, site in sites.items()}
        )
        with torch.no_grad():
            for name, site in sites.items():
                self.heads[name].weight.copy_(site.to_v.weight.T)
                self.heads[name].bias.zero_()

    def loss(
        self,
        sites: Mapping[str, RetrievalSite],
        features: Sequence[Tensor],
        clean: Sequence[Tensor],
        bank: Bank,
        figure: Tensor,
    ) -> Tensor:
        """Mean squared error over sites, of the positions on the figure.

        Args:
            sites, features: the layers, and the noised target's features [B, C, H_s, W_s].
            clean: features of the target without noise, in the same order and shapes.
            figure: [B, 1, h, w], share of each latent pixel that is to be predicted.
        """
        losses = []
        for (name, site), h, wanted in zip(sites.items(), features, clean, strict=True):
            retrieved = self.heads[name](attend_values(site, h, bank.sites[name]))
            wanted = wanted.flatten(2).transpose(1, 2)
            error = retrieved.float() - F.layer_norm(wanted.float(), wanted.shape[-1:])
            weight = F.adaptive_avg_pool2d(figure, h.shape[2:]).flatten(1)
            losses.append((error.square().mean(-1) * weight).sum() / weight.sum().clamp_min(1e-3))
        return torch.stack(losses).mean()


def attend_values(site: RetrievalSite, h: Tensor, bank: SiteBank) -> Tensor:
    """softmax(q K^T / sqrt(d) + log w) V at every position of the features h: [B, H * W, C]."""
    retrieved = cross_attention(
        site.query(h), bank.keys, bank.values, bank.bias, site.heads, site.attend
    )
    maps = unpool_queries(retrieved.transpose(1, 2), h.shape[2:], site.pool)
    return maps.flatten(2).transpose(1, 2)
