"""The bank: what was encoded of the references, as keys and values of every site (DESIGN §3).

A reference is encoded and projected once; a `Bank` joins the projections of several references,
their weights and the null token, and is only read while sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .errors import RetrievalError


@dataclass(frozen=True, eq=False)
class EncodedReference:
    """One reference, projected: per site keys and values [N, D] of the tokens that were kept.

    Attributes:
        keys, values: site -> [N, D]; tokens wholly outside the reference's mask are not in it.
        weight: >= 0; enters as log(weight) on the attention logits, 0 removes the reference.
        concept: what was to be taken ("face", "clothes", "figure", or tags).
        thumbnail: a small picture of it, uint8 [h, w, 3], or None.
    """

    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    weight: float = 1.0
    concept: str = "figure"
    thumbnail: Tensor | None = None

    def with_weight(self, weight: float) -> EncodedReference:
        """The same reference with another weight; RetrievalError as in `check_weight`."""
        return replace(self, weight=check_weight(weight))


@dataclass(frozen=True, eq=False)
class SiteBank:
    """Keys and values [G, N, D] of one site for G banks side by side, a null token first if any.

    Attributes:
        bias: additive on the logits, [G, N] (log weights, -inf for what is masked), or None
            where it would be all zero.
        owner: [N], or [G, N] where they differ, index of the reference that each token belongs
            to, -1 for the null token.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None
    owner: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype) -> SiteBank:
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return SiteBank(
            self.keys.to(device, dtype), self.values.to(device, dtype), bias, self.owner.to(device)
        )


@dataclass(frozen=True, eq=False)
class Bank:
    """All sites of one or more banks; see `SiteBank`.

    `references` is the number of references that count (weight above 0); an empty bank (0) is
    never attended to, so that sampling is bit for bit the base model's.
    """

    sites: Mapping[str, SiteBank] = field(default_factory=dict)
    references: int = 0

    @property
    def empty(self) -> bool:
        return self.references == 0 or not self.sites

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Bank:
        return Bank({k: site.to(device, dtype) for k, site in self.sites.items()}, self.references)

    def nbytes(self) -> int:
        """Memory of keys, values and biases in bytes."""
        tensors = (t for s in self.sites.values() for t in (s.keys, s.values, s.bias))
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def check_weight(weight: float) -> float:
    """A reference's weight as a float; RetrievalError for NaN, infinite or negative ones."""
    value = float(weight)
    if not math.isfinite(value) or value < 0:
        raise RetrievalError(
            f"A reference has weight {value}, which is not a number of 0 or more; set it between "
            "0 and 2 (0 leaves the reference out)."
        )
    return value


def join(references: Sequence[EncodedReference], null_keys: Mapping[str, Tensor] | None) -> Bank:
    """One bank (G = 1) of several references and the null token.

    Args:
        references: in the order that `SiteBank.owner` counts; an empty list gives an empty bank.
        null_keys: site -> [D], the learned key of "retrieve nothing"; its value is zero. None
            for a bank without null tokens.

    Raises:
        RetrievalError: a weight is NaN, infinite or negative, or all of them are 0.
    """
    if not references:
        return Bank()
    weights = [check_weight(reference.weight) for reference in references]
    if not any(weights):
        raise RetrievalError(
            f"All {len(weights)} references have weight 0, so there is nothing to retrieve; give "
            "at least one a weight above 0, or set the strength to 0 to switch retrieval off."
        )
    kept = [(i, r, w) for i, (r, w) in enumerate(zip(references, weights, strict=True)) if w > 0]
    sites = {}
    for site, first in kept[0][1].keys.items():
        null = _null(null_keys, site, first)
        keys = torch.cat([null, *(r.keys[site] for _, r, _ in kept)])
        values = torch.cat([torch.zeros_like(null), *(r.values[site] for _, r, _ in kept)])
        counts = [len(null), *(r.keys[site].shape[0] for _, r, _ in kept)]
        owner = _spread([-1, *(i for i, _, _ in kept)], counts, keys.device)
        bias = None
        if any(w != 1.0 for _, _, w in kept):
            logs = torch.tensor([0.0, *(math.log(w) for _, _, w in kept)], dtype=torch.float64)
            bias = logs.repeat_interleave(torch.tensor(counts)).to(keys)[None]
        sites[site] = SiteBank(keys[None], values[None], bias, owner)
    return Bank(sites, len(kept))


def stack(
    keys: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    null_keys: Mapping[str, Tensor] | None,
    keep: Mapping[str, Tensor] | None = None,
) -> Bank:
    """G banks of R references each, side by side, as training uses them.

    The null token cannot be masked, so a bank whose references are all dropped retrieves nothing.

    Args:
        keys, values: site -> [G, R, N, D].
        keep: site -> bool [G, R, N], False for tokens left out (masked, or a dropped reference).
    """
    sites, count = {}, 0
    for site, k in keys.items():
        groups, count, tokens, _ = k.shape
        null = _null(null_keys, site, k).expand(groups, -1, -1)
        joined_keys = torch.cat([null, k.flatten(1, 2)], 1)
        joined_values = torch.cat([torch.zeros_like(null), values[site].flatten(1, 2)], 1)
        owner = _spread([-1, *range(count)], [null.shape[1]] + [tokens] * count, k.device)
        bias = None
        if keep is not None and not bool(keep[site].all()):
            bias = torch.zeros(joined_keys.shape[:2], dtype=k.dtype, device=k.device)
            bias[:, null.shape[1] :].masked_fill_(~keep[site].flatten(1, 2), float("-inf"))
        sites[site] = SiteBank(joined_keys, joined_values, bias, owner)
    return Bank(sites, count)


def _null(null_keys: Mapping[str, Tensor] | None, site: str, like: Tensor) -> Tensor:
    """The null token's key [1, D], or none, [0, D]."""
    if null_keys is None:
        return like.new_zeros(0, like.shape[-1])
    return null_keys[site][None].to(like)


def _spread(values: Iterable[int], counts: Sequence[int], device: torch.device) -> Tensor:
    spread = torch.tensor(list(values)).repeat_interleave(torch.tensor(list(counts)))
    return spread.to(device)
