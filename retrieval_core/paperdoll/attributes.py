"""The attribute loss: retrieved values must predict the attributes that the references show.

This goes past the paper. A hair style or a garment's cut changes where things are drawn, not only
how, and the diffusion loss alone took far longer to transfer these than to transfer colours. For
data sets with attribute labels, a linear classifier at each deeper site predicts them from the
values retrieved where the target shows their part. The classifiers are only used in training.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bank.site_bank import Bank
from ..network.retrieval_site import RetrievalSite
from ..training.correspondence import find_parts, measure_part_shares
from ..training.reconstruction import attend_values


class AttributeReader(nn.Module):
    """Linear classifiers of all attributes at several sites.

    Args:
        widths: site -> its number of channels, for the sites that get a classifier.
        sizes: attribute -> (label of its part, number of its values).
    """

    def __init__(self, widths: Mapping[str, int], sizes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.attributes = list(sizes.values())
        outputs = sum(count for _, count in self.attributes)
        self.heads = nn.ModuleDict({s: nn.Linear(c, outputs) for s, c in widths.items()})

    def loss(
        self,
        sites: Mapping[str, RetrievalSite],
        features: Mapping[str, Tensor],
        bank: Bank,
        target_parts: Tensor,
        reference_parts: Tensor,
        num_parts: int,
        values: Tensor,
    ) -> Tensor:
        """Mean cross entropy over sites, attributes and the targets whose references show them.

        Args:
            sites, features: of all sites; features [B, C, H_s, W_s].
            bank, target_parts, reference_parts, num_parts: see `correspondence_loss`.
            values: [B, A] the targets' attributes, in the order of `sizes`.
        """
        losses = []
        for name, head in self.heads.items():
            h, site_bank = features[name], bank.sites[name]
            size = h.shape[-2:]
            shown = find_parts(reference_parts, num_parts, size, site_bank)
            shown = shown.repeat_interleave(len(h) // len(shown), 0)
            shares = measure_part_shares(target_parts, num_parts, size)  # [B, N, P]
            retrieved = attend_values(sites[name], h, site_bank)  # [B, N, C]
            means = torch.einsum("bnp,bnc->bpc", shares.to(retrieved), retrieved)
            area = shares.sum(1)
            means = means / area.clamp_min(1e-3)[..., None]
            logits = head(F.layer_norm(means, means.shape[-1:]))  # [B, P, values of all attributes]
            losses.append(self._cross_entropy(logits, shown & (area > 0.2), values))
        return torch.stack(losses).mean()

    def _cross_entropy(self, logits: Tensor, counts: Tensor, values: Tensor) -> Tensor:
        """logits [B, P, values of all attributes]; counts bool [B, P], which parts count."""
        losses, start = [], 0
        for i, (part, size) in enumerate(self.attributes):
            own = logits[:, part, start : start + size]
            each = F.cross_entropy(own, values[:, i], reduction="none")
            losses.append((each * counts[:, part]).sum() / counts[:, part].sum().clamp_min(1))
            start += size
        return torch.stack(losses).mean()
