"""Token budget: merges similar tokens of a bank once, before sampling.

A budget per site bounds the cost of a step for any number of references. Tokens are selected in
rounds: each round takes those with the largest product of importance and squared distance to the
nearest token selected so far (farthest-first traversal, many at a time). A token's importance is
the attention that it draws from the references' own content, so that an eye outweighs a wall. Every
other token then merges into the nearest selected one: their mean weighted by importance, with
log(sum of their weights) on its logits, so that it draws approximately the attention that they drew
together (exactly, if they were equal). The selection is deterministic.

`python -m tests.benchmarks.token_budget` measures what merging loses and what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RetrievalError
from .tokens import SiteTokens

AUTOMATIC: Literal["automatic"] = "automatic"
# Tokens at a site: AUTOMATIC, one number for all sites, numbers by site, or None for all tokens.
Budget = Literal["automatic"] | int | Mapping[str, int] | None

LEAST_AUTOMATIC = 512
_ROUNDS = 8
_CANDIDATES = 4  # candidates per token to select
_WIDTH = 32  # of the features in which distances are measured
_SAMPLED = 1024  # tokens that their basis is found from
_LEAST_SHARE = 1e-3  # lower limit of importance, relative to its mean
_CHUNK = 16384  # tokens per product with the selected tokens


def check_budget(budget: Budget) -> None:
    """RetrievalError for a budget of less than one token."""
    if isinstance(budget, int) and budget < 1:
        raise RetrievalError(
            f"The token budget is {budget}, which leaves nothing to retrieve; give 1 or more, or "
            "keep all tokens."
        )


def choose_budgets(
    budget: Budget, factors: Mapping[str, int], latent_size: tuple[int, int]
) -> dict[str, int | None]:
    """site -> its maximum number of tokens, or None for no limit.

    Automatic is one token for each position of a reference at the site, or at half the latent's
    resolution where the site is finer, and never less than `LEAST_AUTOMATIC`. Attention to the bank
    then never costs more than the base model's own attention to the picture.

    Args:
        factors: site -> latent pixels that a token spans along an edge.
        latent_size: height and width of the references' latent.
    """
    if isinstance(budget, Mapping):
        return {site: budget.get(site) for site in factors}
    if budget != AUTOMATIC:
        return dict.fromkeys(factors, budget)
    edges = {site: [-(-edge // max(factor, 2)) for edge in latent_size]
             for site, factor in factors.items()}  # fmt: skip
    return {site: max(LEAST_AUTOMATIC, math.prod(edge)) for site, edge in edges.items()}


def limit_tokens(
    site: SiteTokens, budget: int, measure: Callable[[Tensor, Tensor], Tensor] | None = None
) -> SiteTokens:
    """Merges the tokens of a site into at most `budget`; `owner` is that of the selected token.

    Gradients reach the tokens through their means; which tokens merge has none.

    Args:
        measure: from features [G, N, F] and their basis [D, F] (`project_tokens`, P = 1) to the
            importance [G, N] of all tokens; None: importance is the tokens' weight.
    """
    # Distances need float32 where training computes in half precision; CUDA has no QR in it either.
    exact = torch.autocast(site.tokens.device.type, enabled=False)
    with torch.no_grad():
        with exact:
            features, bases = project_tokens(site)
        importance = weights = site.weights
        if measure is not None:
            floor = _LEAST_SHARE / weights.shape[1]
            importance = measure(features, bases[0]).clamp_min(floor) * (weights > 0)
        with exact:
            selected, labels = choose_tokens(features, importance, budget)
    return _merge(site, selected, labels, importance)


def project_tokens(site: SiteTokens) -> tuple[Tensor, list[Tensor]]:
    """Features [G, N, P * F] in which distances are measured, and their bases [D, F].

    Tokens [G, P, N, D] are projected on about the directions in which they are largest: one step of
    subspace iteration from random directions, on some of the tokens. Keys and values (P = 2) are
    centred and scaled to one size.
    """
    weights = site.weights[..., None]
    total = weights.sum(1, keepdim=True).clamp_min(1e-12)
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(weights.shape[1], generator=generator)[:_SAMPLED].to(weights.device)
    features, bases = [], []
    for tokens in site.tokens.float().unbind(1):
        x = (tokens[:, some] * weights[:, some]).flatten(0, 1)
        start = torch.randn(x.shape[1], _WIDTH, generator=generator).to(x)
        basis = torch.linalg.qr(x.T @ (x @ start)).Q
        projected = tokens @ basis
        if site.tokens.shape[1] > 1:
            centred = projected - (projected * weights).sum(1, keepdim=True) / total
            size = (centred.square() * weights).sum((1, 2), keepdim=True) / total
            projected = centred / size.sqrt().clamp_min(1e-12)
        features.append(projected)
        bases.append(basis)
    return torch.cat(features, -1), bases


def choose_tokens(features: Tensor, importance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Selects representative tokens by farthest-first traversal.

    Args:
        features: [G, N, F], in which distances are measured. importance: [G, N].

    Returns:
        Indices [G, count] of the selected tokens, and for each token [G, N] which of these is
        nearest.
    """
    squares = features.square().sum(-1)
    shares = importance / importance.sum(1, keepdim=True).clamp_min(1e-12)
    middle = torch.einsum("gn,gnf->gf", shares, features)[:, None]
    distance = (features - middle).square().sum(-1)
    labels = torch.zeros_like(distance, dtype=torch.long)
    selected: list[Tensor] = []
    for turn in range(_ROUNDS):
        first, last = (count * t // _ROUNDS for t in (turn, turn + 1))
        if first == last:
            continue
        newest = _farthest(features, importance, distance, last - first)
        centres = _take(features, newest)
        gap, nearest = _nearest(features, centres)
        gap = (gap + squares).clamp_min(0).scatter(1, newest, 0.0)
        nearer = gap < distance if selected else torch.ones_like(gap, dtype=torch.bool)
        distance = torch.where(nearer, gap, distance)
        labels = torch.where(nearer, nearest + first, labels)
        selected.append(newest)
    return torch.cat(selected, 1), labels


def _farthest(features: Tensor, importance: Tensor, distance: Tensor, count: int) -> Tensor:
    """The next tokens to select, [G, count].

    Of the candidates with the highest scores these have the highest scores after all better
    candidates were selected.
    """
    many = min(_CANDIDATES * count, distance.shape[1])
    scores, candidates = (importance * distance).topk(many, 1)
    x = _take(features, candidates)
    left = importance.gather(1, candidates)[..., None] * torch.cdist(x, x).square()
    better = torch.ones_like(left, dtype=torch.bool).tril(-1)
    left = torch.minimum(scores, left.masked_fill(~better, torch.inf).amin(2))
    return candidates.gather(1, left.topk(count, 1).indices)


def _take(features: Tensor, indices: Tensor) -> Tensor:
    return features.gather(1, indices[..., None].expand(-1, -1, features.shape[2]))


def _nearest(features: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """|c|^2 - 2 x c of the centre [G, n, F] nearest to each x, and the index of that c: [G, N]."""
    offset = centres.square().sum(-1)[:, None]
    found = [
        torch.baddbmm(offset, x, centres.transpose(1, 2), alpha=-2).min(-1)
        for x in features.split(_CHUNK, 1)
    ]
    return torch.cat([f.values for f in found], 1), torch.cat([f.indices for f in found], 1)


def _merge(site: SiteTokens, selected: Tensor, labels: Tensor, importance: Tensor) -> SiteTokens:
    """Merges tokens with one label [G, N] into their mean, weighted by importance [G, N]."""
    groups, count = selected.shape
    labels = (labels + count * torch.arange(groups, device=labels.device)[:, None]).flatten()
    order = labels.argsort(stable=True)
    lengths = torch.bincount(labels, minlength=groups * count)
    starts = lengths.cumsum(0) - lengths
    ones = torch.ones_like(importance)

    def add(values: Tensor, shares: Tensor) -> Tensor:
        """Weighted sums of the values [G, N, D] by label, [G, count, D].

        By sorted segments: scattered additions have no fixed order on GPUs.
        """
        share = shares.flatten()[order]
        sums = F.embedding_bag(
            order, values.flatten(0, 1), starts, mode="sum", per_sample_weights=share
        )
        return sums.unflatten(0, (groups, count))

    size = add(site.weights[..., None], ones)[..., 0]
    used = (size > 0).any(0)  # drops tokens selected twice, or masked in every bank
    total = add(importance[..., None], ones)[:, used]
    total = total.clamp_min(torch.finfo(torch.float32).tiny)
    means = [add(t, importance)[:, used] / total for t in site.tokens.float().unbind(1)]
    owner = site.owner.expand_as(importance).gather(1, selected)[:, used]
    return SiteTokens(
        torch.stack(means, 1).to(site.tokens),
        size[:, used].log().to(site.tokens),
        owner[0] if len(owner) == 1 else owner,
    )
