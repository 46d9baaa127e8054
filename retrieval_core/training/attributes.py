"""Attributes: while training, what was retrieved must tell what the references show.

This goes past the paper. A hair style or a garment's cut changes where things are drawn, not only
how, and the diffusion loss alone took far longer to transfer these than to transfer colours. Where
a data set names such attributes (tags do), a linear classifier at each deeper site reads them off
what was retrieved at the places of their part. The classifiers are not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bank.site_bank import Bank, SiteBank
from ..network.retrieval_site import RetrievalSite, cross_attention, unpool_queries
from .correspondence import find_parts, measure_part_shares


class AttributeReader(nn.Module):
    """Classifiers of every attribute at every site.

    Args:
        widths: site -> its number of channels, for the sites to be read.
        sizes: attribute -> (part that it belongs to, number of its values).
    """

    def __init__(self, widths: Mapping[str, int], sizes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.attributes = [(part, count) for part, count in sizes.values()]
        outputs = sum(count for _, count in self.attributes)
        self.heads = nn.ModuleDict({s: nn.Linear(c, outputs) for s, c in widths.items()})

    def loss(
        self,
        sites: Mapping[str, RetrievalSite],
        features: Mapping[str, Tensor],
        bank: Bank,
        target_parts: Tensor,
        reference_parts: Tensor,
        parts: int,
        values: Tensor,
    ) -> Tensor:
        """Mean cross entropy over sites, attributes and the targets whose references show them.

        Args:
            sites, features: of all sites; features [B, C, H_s, W_s].
            bank, target_parts, reference_parts, parts: see `correspondence_loss`.
            values: [B, A] the targets' attributes, in the order of `sizes`.
        """
        losses = []
        for name, head in self.heads.items():
            h, bank_here = features[name], bank.sites[name]
            size = h.shape[-2:]
            found = find_parts(reference_parts, parts, size, bank_here)
            found = found.repeat_interleave(len(h) // len(found), 0)
            places = measure_part_shares(target_parts, parts, size)  # [B, N, P]
            retrieved = attend_values(sites[name], h, bank_here)  # [B, N, C]
            means = torch.einsum("bnp,bnc->bpc", places.to(retrieved), retrieved)
            filled = places.sum(1)
            means = means / filled.clamp_min(1e-3)[..., None]
            read = head(F.layer_norm(means, means.shape[-1:]))  # [B, P, values of all attributes]
            losses.append(self._cross_entropy(read, found & (filled > 0.2), values))
        return torch.stack(losses).mean()

    def _cross_entropy(self, read: Tensor, counts: Tensor, values: Tensor) -> Tensor:
        pieces = read.split([count for _, count in self.attributes], -1)
        losses = []
        for i, ((part, _), piece) in enumerate(zip(self.attributes, pieces, strict=True)):
            each = F.cross_entropy(piece[:, part], values[:, i], reduction="none")
            losses.append((each * counts[:, part]).sum() / counts[:, part].sum().clamp_min(1))
        return torch.stack(losses).mean()


def attend_values(site: RetrievalSite, h: Tensor, bank: SiteBank) -> Tensor:
    """softmax(q K^T / sqrt(d) + log w) V at every position of the features h: [B, H * W, C]."""
    found = cross_attention(
        site.query(h), bank.keys, bank.values, bank.bias, site.heads, site.attend
    )
    return unpool_queries(found.transpose(1, 2), h.shape[2:], site.pool).flatten(2).transpose(1, 2)


def choose_deeper_sites(names: Sequence[str]) -> list[str]:
    """All sites but the first two, whose features are bare convolutions that see too little."""
    return list(names)[2:]
