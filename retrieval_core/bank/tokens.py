"""Token storage: features of one encoded reference, and the batched form that a bank is made from.

Tokens are the retrieval encoder's features f_s at every site. In the training-free mode they are
the keys and values of the base model's self-attention, and at the site `MATCHED` keys and latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import RetrievalError

# Sites of this layer and a noise level, in the training-free mode, keep the keys of tokens outside
# a mask, with values of 0: see `training_free.latent_pull`.
MATCHED = "match"


@dataclass(frozen=True, eq=False)
class EncodedReference:
    """One encoded reference.

    Attributes:
        tokens: site -> [P, N, D], N tokens, without those wholly outside the reference's mask.
            P = 1: features f_s. P = 2: keys and values (training-free mode).
        weight: >= 0; enters as log(weight) on the attention logits, 0 removes the reference.
        concept: what is to be taken ("face", "clothes", "figure", or tags).
        latent_size: height and width of the encoded latent.
        thumbnail: uint8 [h, w, 3], or None.
        mask: [S, S] of the square that was encoded, above 0 where tokens were kept; None where all
            were, and for references from a file.
    """

    tokens: Mapping[str, Tensor]
    weight: float = 1.0
    concept: str = "figure"
    latent_size: tuple[int, int] = (0, 0)
    thumbnail: Tensor | None = None
    mask: Tensor | None = None

    def with_weight(self, weight: float) -> EncodedReference:
        """The same reference with another weight; RetrievalError as in `check_weight`."""
        return replace(self, weight=check_weight(weight))

    def to(self, device: torch.device | str) -> EncodedReference:
        """The same reference with contiguous tokens on another device."""
        tokens = {site: t.to(device).contiguous() for site, t in self.tokens.items()}
        return replace(self, tokens=tokens)

    def nbytes(self) -> int:
        """Memory of the tokens in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tokens.values())


@dataclass(frozen=True, eq=False)
class SiteTokens:
    """Tokens of one site for a batch of G banks.

    Attributes:
        tokens: [G, P, N, D], see `EncodedReference.tokens`.
        bias: additive on the logits, [G, N] (log weights, -inf for what is masked), or None
            where it would be all zero.
        owner: index of the reference that each token belongs to, [N], or [G, N] where rows differ.
    """

    tokens: Tensor
    bias: Tensor | None
    owner: Tensor

    @property
    def weights(self) -> Tensor:
        """Weight of each token, float32 [G, N]: exp(bias)."""
        if self.bias is None:
            return torch.ones_like(self.tokens[:, 0, :, 0], dtype=torch.float32)
        return self.bias.float().exp()

    def to(self, device: torch.device | str) -> SiteTokens:
        bias = None if self.bias is None else self.bias.to(device)
        return SiteTokens(self.tokens.to(device), bias, self.owner.to(device))


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of all sites for a batch of G banks.

    Attributes:
        sites: site -> its tokens.
        references: number of references with a weight above 0.
        latent_size: height and width of the largest reference's latent.
    """

    sites: Mapping[str, SiteTokens] = field(default_factory=dict)
    references: int = 0
    latent_size: tuple[int, int] = (0, 0)

    def count_largest(self) -> int:
        """Number of values of the largest site."""
        return max((site.tokens.numel() for site in self.sites.values()), default=0)

    def at(self, site: str) -> Tokens:
        """The tokens of one site only."""
        return replace(self, sites={site: self.sites[site]})


def check_weight(weight: float) -> float:
    """A reference's weight as a float; RetrievalError for NaN, infinite or negative ones."""
    value = float(weight)
    if not math.isfinite(value) or value < 0:
        raise RetrievalError(
            f"A reference has weight {value}, which is not a number of 0 or more; set it between "
            "0 and 2 (0 leaves the reference out)."
        )
    return value


def join_references(references: Sequence[EncodedReference]) -> Tokens:
    """The tokens of several references for one bank (G = 1); those of weight 0 are left out.

    Args:
        references: in the order of `SiteTokens.owner`; an empty list gives no tokens.

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
    used = [(i, r, w) for i, (r, w) in enumerate(zip(references, weights, strict=True)) if w > 0]
    sites = {}
    for site in used[0][1].tokens:
        tokens = torch.cat([r.tokens[site] for _, r, _ in used], 1)
        counts = torch.tensor([r.tokens[site].shape[1] for _, r, _ in used])
        bias = None
        if any(w != 1.0 for _, _, w in used):
            logs = torch.tensor([math.log(w) for _, _, w in used], dtype=torch.float64)
            bias = logs.repeat_interleave(counts).to(tokens)[None]
        owner = torch.tensor([i for i, _, _ in used]).repeat_interleave(counts).to(tokens.device)
        sites[site] = SiteTokens(tokens[None], bias, owner)
    largest = max((r.latent_size for _, r, _ in used), key=math.prod)
    return Tokens(sites, len(used), largest)
