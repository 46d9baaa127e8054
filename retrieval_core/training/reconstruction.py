"""The reconstruction loss: retrieved values must predict the features of the clean target.

This goes past the paper. The diffusion loss reaches values and attention only through the decoder,
and teaches them slowly what of a reference is worth to retrieve. Here a linear layer at each site
predicts, from what a position retrieves, what the frozen base makes of the target without noise at
that position. It needs no labels but the figure's part labels or its content mask, and the layers
are only used in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bank.site_bank import Bank
from ..network.retrieval_site import RetrievalSite
from .attributes import attend_values


class FeatureReader(nn.Module):
    """Linear predictors of the target's normalised features at all sites.

    Args:
        widths: site -> its number of channels.
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({site: nn.Linear(c, c) for site, c in widths.items()})

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
