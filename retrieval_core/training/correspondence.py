"""The correspondence loss: attention is supervised with which tokens show the same part.

This goes past the paper. The diffusion loss reaches the attention logits only through the retrieved
values, and they stay near uniform for thousands of steps. For data sets with part labels per pixel
(hair, upper garment, ...; a head box and a figure mask are enough for two parts), a cross entropy
on the share of attention per part trains them much sooner. Positions whose content no reference may
give (the background, or a part that no reference shows) are to attend to the null token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..bank.site_bank import Bank, SiteBank
from ..network.retrieval_site import RetrievalSite

UNKNOWN = 255  # label of pictures that have none; they teach nothing
QUERIES = 192  # positions drawn per bank and site
_LEAST = 1e-3  # added to each share: keeps the loss and its gradient finite at share 0
_SHOWN = 0.05  # a token shows a part that fills at least this share of its area


def correspondence_loss(
    sites: Mapping[str, RetrievalSite],
    features: Sequence[Tensor],
    bank: Bank,
    target_parts: Tensor,
    reference_parts: Tensor,
    num_parts: int,
    generator: torch.Generator,
) -> Tensor:
    """Mean cross entropy of the parts' attention shares, over sites and random positions.

    Args:
        sites, features: the layers, and their features [B, C, H_s, W_s], in the same order.
        bank: G banks of R references with all tokens, masked ones by their bias, as
            `encoding.batch_features` makes them.
        target_parts: uint8 [B, h, w], 0 for no part. reference_parts: uint8 [G * R, h, w].
        num_parts: number of labels, 0 included.
        generator: draws the positions.
    """
    losses = []
    for (name, layer), h in zip(sites.items(), features, strict=True):
        site_bank = bank.sites[name]
        groups, size = site_bank.keys.shape[0], h.shape[-2:]
        shown = measure_part_shares(reference_parts, num_parts, size)
        wanted = measure_part_shares(target_parts, num_parts, size)
        shown, wanted = (t.reshape(groups, -1, num_parts) for t in (shown, wanted))
        positions = torch.randperm(wanted.shape[1], generator=generator, device=generator.device)
        positions = positions[:QUERIES].to(h.device)
        attention = attend_from(layer, h, site_bank, positions)
        wanted = wanted[:, positions].to(attention)
        losses.append(_cross_entropy(attention, shown.to(attention), wanted, site_bank))
    return torch.stack(losses).mean()


def attend_from(layer: RetrievalSite, h: Tensor, bank: SiteBank, positions: Tensor) -> Tensor:
    """Attention of some positions, averaged over heads: [G, Q, N], each row summing to 1.

    Args:
        positions: [Q] indices into the B / G * H * W positions that attend to each bank.
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


def _cross_entropy(attention: Tensor, shown: Tensor, wanted: Tensor, bank: SiteBank) -> Tensor:
    """attention [G, Q, 1 + N], shown [G, N, P], wanted [G, Q, P] -> a scalar."""
    found = _mark_shown(shown, bank)
    missing = (wanted * ~found[:, None]).sum(-1)
    wanted = wanted * found[:, None]
    wanted = torch.cat([(wanted[..., 0] + missing)[..., None], wanted[..., 1:]], -1)
    # Part 0 is the null token's alone: attention to the references' background is always wrong.
    given = torch.einsum("gqn,gnp->gqp", attention[..., 1:], shown[..., 1:])
    given = torch.cat([attention[..., :1], given], -1)
    return -(wanted * (given + _LEAST).log()).sum(-1).mean()


def find_parts(labels: Tensor, num_parts: int, size: Sequence[int], bank: SiteBank) -> Tensor:
    """bool [G, P]: the parts that each bank's references show, from labels [G * R, h, w]."""
    shares = measure_part_shares(labels, num_parts, size)
    return _mark_shown(shares.reshape(len(bank.keys), -1, num_parts), bank)


def _mark_shown(shares: Tensor, bank: SiteBank) -> Tensor:
    """Part shares [G, N, P] of a bank's tokens -> bool [G, P]; part 0 counts as shown."""
    if bank.bias is not None:
        shares = shares * bank.bias[:, 1:, None].isfinite()
    shown = (shares > _SHOWN).any(1)
    shown[:, 0] = True
    return shown


def count_labels(labels: Tensor) -> int:
    """1 more than the largest label but `UNKNOWN`."""
    return int(labels.masked_fill(labels == UNKNOWN, 0).max()) + 1


def average_parts(squares: Tensor, labels: Tensor) -> Tensor:
    """Mean of squares [B, C, H, W] in each part of each row, averaged over all parts that it shows.

    labels: uint8 [B, h, w].
    """
    shares = measure_part_shares(labels, count_labels(labels), squares.shape[2:])[..., 1:]
    sums = torch.einsum("bnp,bn->bp", shares, squares.mean(1).flatten(1).to(shares))
    areas = shares.sum(1)
    shown = areas > _LEAST
    return (sums / areas.clamp_min(_LEAST))[shown].sum() / shown.sum().clamp_min(1)


def measure_part_shares(labels: Tensor, num_parts: int, size: Sequence[int]) -> Tensor:
    """uint8 [B, h, w] -> [B, H * W, P]: the share of each position's area that each part fills."""
    values = torch.arange(num_parts, dtype=labels.dtype, device=labels.device)
    one_hot = (labels[:, None] == values[:, None, None]).float()
    return F.adaptive_avg_pool2d(one_hot, tuple(size)).flatten(2).transpose(1, 2)
