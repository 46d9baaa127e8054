"""Correspondence: while training, attention is told which tokens show the same thing.

This goes past the paper. Diffusion's own loss reaches the attention logits only through what was
retrieved, and they stay near uniform for thousands of steps; where a data set knows what its pixels
show (hair, upper garment, ...; a head box and a figure mask are enough for two parts), a cross
entropy on the share of attention that each part gets finds the places much sooner. What no
reference is to give (the background, or a part that none of them shows) belongs to the null token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..bank.site_bank import Bank, SiteBank
from ..network.retrieval_site import RetrievalSite

QUERIES = 192  # places looked at, of each bank and site
_LEAST = 1e-3  # added to each share: keeps the loss finite, and its gradient at work, at zero
_SHOWN = 0.05  # a token shows a part where it fills at least this much of it


def correspondence_loss(
    sites: Mapping[str, RetrievalSite],
    features: Sequence[Tensor],
    bank: Bank,
    target_parts: Tensor,
    reference_parts: Tensor,
    parts: int,
    generator: torch.Generator,
) -> Tensor:
    """Mean cross entropy of the parts' attention shares, over sites and random places.

    Args:
        sites, features: the layers, and their features [B, C, H_s, W_s], in the same order.
        bank: G banks of R references each, with every token (masks as a bias; see `tokens.stack`).
        target_parts: uint8 [B, h, w], 0 for nothing. reference_parts: uint8 [G * R, h, w].
        parts: the number of labels, 0 included.
        generator: draws the places.
    """
    losses = []
    for (name, layer), h in zip(sites.items(), features, strict=True):
        site = bank.sites[name]
        groups, size = site.keys.shape[0], h.shape[-2:]
        shown = measure_part_shares(reference_parts, parts, size).reshape(groups, -1, parts)
        wanted = measure_part_shares(target_parts, parts, size).reshape(groups, -1, parts)
        picked = torch.randperm(wanted.shape[1], generator=generator, device=generator.device)
        picked = picked[:QUERIES].to(h.device)
        attention = attend_from(layer, h, site, picked)
        wanted = wanted[:, picked].to(attention)
        losses.append(_cross_entropy(attention, shown.to(attention), wanted, site))
    return torch.stack(losses).mean()


def attend_from(layer: RetrievalSite, h: Tensor, bank: SiteBank, positions: Tensor) -> Tensor:
    """Attention of some positions, the mean of the heads: [G, Q, N], each row adding up to 1.

    Args:
        positions: [Q] indices into the B / G * H * W positions that each of the bank's entries
            serves.
    """
    (height, width), pool = h.shape[2:], layer.pool
    rows, columns = -(-height // pool), -(-width // pool)
    row, y, x = (positions // (height * width), positions // width % height, positions % width)
    queries = (row * rows + y // pool) * columns + x // pool
    q = layer.query(h).reshape(len(bank.keys), -1, layer.channels)[:, queries]
    q, k = (rearrange(t, "g n (h d) -> g h n d", h=layer.heads) for t in (q, bank.keys))
    logits = q @ k.transpose(2, 3) / k.shape[3] ** 0.5
    if bank.bias is not None:
        logits = logits + bank.bias[:, None, None]
    return logits.softmax(-1).mean(1)


def _cross_entropy(attention: Tensor, shown: Tensor, wanted: Tensor, site: SiteBank) -> Tensor:
    """attention [G, Q, 1 + N], shown [G, N, P], wanted [G, Q, P] -> a scalar."""
    found = _found(shown, site)
    missing = (wanted * ~found[:, None]).sum(-1)
    wanted = wanted * found[:, None]
    wanted = torch.cat([(wanted[..., 0] + missing)[..., None], wanted[..., 1:]], -1)
    # The references' own background is nobody's: attention to it is always lost.
    given = torch.einsum("gqn,gnp->gqp", attention[..., 1:], shown[..., 1:])
    given = torch.cat([attention[..., :1], given], -1)
    return -(wanted * (given + _LEAST).log()).sum(-1).mean()


def find_parts(labels: Tensor, parts: int, size: Sequence[int], site: SiteBank) -> Tensor:
    """bool [G, P]: which parts the references' labels [G * R, h, w] show among a bank's tokens."""
    shown = measure_part_shares(labels, parts, size).reshape(len(site.keys), -1, parts)
    return _found(shown, site)


def _found(shown: Tensor, site: SiteBank) -> Tensor:
    if site.bias is not None:
        shown = shown * site.bias[:, 1:, None].isfinite()
    found = (shown > _SHOWN).any(1)
    found[:, 0] = True
    return found


def measure_part_shares(labels: Tensor, parts: int, size: Sequence[int]) -> Tensor:
    """uint8 [B, h, w] -> [B, H * W, P]: how much of each place each part fills."""
    values = torch.arange(parts, dtype=labels.dtype, device=labels.device)
    one_hot = (labels[:, None] == values[:, None, None]).float()
    return F.adaptive_avg_pool2d(one_hot, tuple(size)).flatten(2).transpose(1, 2)
