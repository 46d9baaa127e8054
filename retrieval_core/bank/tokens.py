"""What is kept of references, token by token, and references side by side: what banks are made of.

An `EncodedReference` holds the features f_s that the retrieval encoder read at every site, or the
keys and values that a base model's own attention had. `bank.project` makes banks of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import RetrievalError


@dataclass(frozen=True, eq=False)
class EncodedReference:
    """One reference: what was read of it at each site.

    Attributes:
        tokens: site -> [P, N, D] of the N tokens that were kept; those wholly outside the
            reference's mask are not in it. P = 1: features f_s, of which a network makes keys and
            values when the bank is built; P = 2: keys and values themselves (training-free mode).
        weight: >= 0; enters as log(weight) on the attention logits, 0 removes the reference.
        concept: what was to be taken ("face", "clothes", "figure", or tags).
        thumbnail: a small picture of it, uint8 [h, w, 3], or None.
    """

    tokens: Mapping[str, Tensor]
    weight: float = 1.0
    concept: str = "figure"
    thumbnail: Tensor | None = None

    def with_weight(self, weight: float) -> EncodedReference:
        """The same reference with another weight; RetrievalError as in `check_weight`."""
        return replace(self, weight=check_weight(weight))

    def at(self, site: str) -> EncodedReference:
        """The same reference with one of its sites only."""
        return replace(self, tokens={site: self.tokens[site]})

    def to(self, device: torch.device | str) -> EncodedReference:
        """Its tokens on another device, laid out for reading."""
        tokens = {site: t.to(device).contiguous() for site, t in self.tokens.items()}
        return replace(self, tokens=tokens)

    def nbytes(self) -> int:
        """Memory of the tokens in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tokens.values())


@dataclass(frozen=True, eq=False)
class SiteTokens:
    """Tokens of one site for G banks side by side.

    Attributes:
        parts: [G, P, N, D], see `EncodedReference.tokens`.
        bias: additive on the logits, [G, N] (log weights, -inf for what is masked), or None
            where it would be all zero.
        owner: [N], or [G, N] where they differ, index of the reference that each token belongs to.
    """

    parts: Tensor
    bias: Tensor | None
    owner: Tensor

    def over(self, budget: int | None) -> bool:
        """Whether there are more tokens than a budget allows; None allows any number."""
        return budget is not None and self.parts.shape[2] > budget

    def to(self, device: torch.device | str) -> SiteTokens:
        bias = None if self.bias is None else self.bias.to(device)
        return SiteTokens(self.parts.to(device), bias, self.owner.to(device))


@dataclass(frozen=True, eq=False)
class Tokens:
    """All sites of one or more banks to be; `references` counts those of a weight above 0."""

    sites: Mapping[str, SiteTokens] = field(default_factory=dict)
    references: int = 0

    def at(self, site: str) -> Tokens:
        """One of the sites only."""
        return Tokens({site: self.sites[site]}, self.references)


def check_weight(weight: float) -> float:
    """A reference's weight as a float; RetrievalError for NaN, infinite or negative ones."""
    value = float(weight)
    if not math.isfinite(value) or value < 0:
        raise RetrievalError(
            f"A reference has weight {value}, which is not a number of 0 or more; set it between "
            "0 and 2 (0 leaves the reference out)."
        )
    return value


def gather(references: Sequence[EncodedReference]) -> Tokens:
    """The tokens of several references for one bank (G = 1).

    Args:
        references: in the order that `SiteTokens.owner` counts; of an empty list, no tokens.

    Raises:
        RetrievalError: a weight is NaN, infinite or negative, or all of them are 0.
    """
    if not references:
        return Tokens()
    weights = [check_weight(reference.weight) for reference in references]
    if not any(weights):
        raise RetrievalError(
            f"All {len(weights)} references have weight 0, so there is nothing to retrieve; give "
            "at least one a weight above 0, or set the strength to 0 to switch retrieval off."
        )
    kept = [(i, r, w) for i, (r, w) in enumerate(zip(references, weights, strict=True)) if w > 0]
    sites = {}
    for site in kept[0][1].tokens:
        parts = torch.cat([r.tokens[site] for _, r, _ in kept], 1)
        counts = [r.tokens[site].shape[1] for _, r, _ in kept]
        owner = _spread([i for i, _, _ in kept], counts, parts.device)
        bias = None
        if any(w != 1.0 for _, _, w in kept):
            logs = torch.tensor([math.log(w) for _, _, w in kept], dtype=torch.float64)
            bias = logs.repeat_interleave(torch.tensor(counts)).to(parts)[None]
        sites[site] = SiteTokens(parts[None], bias, owner)
    return Tokens(sites, len(kept))


def stack(tokens: Mapping[str, Tensor], keep: Mapping[str, Tensor] | None = None) -> Tokens:
    """Tokens of R references each for G banks side by side, as training uses them.

    Args:
        tokens: site -> [G, R, P, N, D].
        keep: site -> bool [G, R, N], False for tokens left out (masked, or a dropped reference).
    """
    sites, count = {}, 0
    for site, given in tokens.items():
        count = given.shape[1]
        parts = given.transpose(1, 2).flatten(2, 3)
        owner = _spread(range(count), [given.shape[3]] * count, given.device)
        bias = None
        if keep is not None and not bool(keep[site].all()):
            bias = parts.new_zeros(len(parts), parts.shape[2])
            bias.masked_fill_(~keep[site].flatten(1, 2), float("-inf"))
        sites[site] = SiteTokens(parts, bias, owner)
    return Tokens(sites, count)


def _spread(values: Iterable[int], counts: Sequence[int], device: torch.device) -> Tensor:
    spread = torch.tensor(list(values)).repeat_interleave(torch.tensor(list(counts)))
    return spread.to(device)
