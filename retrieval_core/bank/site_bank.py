"""The bank: keys and values of every site, of all references and the null token (DESIGN §3).

K_s = W_k LN(f_s), V_s = W_v LN(f_s). Both are linear in LN(f_s), so a token budget is kept before
they are projected: the mean of merged tokens has their mean key and mean value, and only the tokens
that are left cost a projection. A `Bank` is made once and only read while sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .token_budget import check_budget, limit_tokens
from .tokens import SiteTokens, Tokens


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


class Projection(Protocol):
    """What `project` needs of a site's layers (`retrieval.RetrievalSite`)."""

    def normed(self, tokens: Tensor) -> Tensor: ...

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor]: ...

    def null(self) -> Tensor: ...


def project(
    tokens: Tokens,
    layers: Mapping[str, Projection] | None,
    token_budget: int | None = None,
    device: torch.device | str | None = None,
    on_site: Callable[[int, int], None] | None = None,
) -> Bank:
    """The bank of the tokens.

    The null token cannot be masked, so a bank whose references are all dropped retrieves nothing.

    Args:
        layers: of the sites; their null token is put first. None, in the training-free mode: the
            tokens are keys and values, and there is no null token.
        token_budget: the most tokens at a site, null token aside (`limit_tokens`); None: all.
        device: where to compute; the bank is where the tokens were. None: where the tokens are.
        on_site: called with (sites done, sites in all); may raise to interrupt.

    Raises:
        RetrievalError: a budget below 1.
    """
    budget = None if token_budget is None else check_budget(token_budget)
    sites = {}
    for name, given in tokens.sites.items():
        sites[name] = _project(given, None if layers is None else layers[name], budget, device)
        if on_site is not None:
            on_site(len(sites), len(tokens.sites))
    return Bank(sites, tokens.references)


def _project(
    given: SiteTokens,
    layer: Projection | None,
    budget: int | None,
    device: torch.device | str | None,
) -> SiteBank:
    home = given.parts.device
    if device is not None and (layer is not None or given.over(budget)):
        given = given.to(device)
    features = layer is not None and given.parts.shape[1] == 1
    if features:
        given = replace(given, parts=layer.normed(given.parts))
    if budget is not None:
        given = limit_tokens(given, budget)
    keys, values = layer.project(given.parts[:, 0]) if features else given.parts.unbind(1)
    bias, owner = given.bias, given.owner
    if layer is not None:
        null = layer.null()[None, None].to(keys).expand(len(keys), -1, -1)
        keys, values = torch.cat([null, keys], 1), torch.cat([torch.zeros_like(null), values], 1)
        owner = F.pad(owner, (1, 0), value=-1)
        bias = None if bias is None else F.pad(bias, (1, 0))
    return SiteBank(keys, values, bias, owner).to(home, keys.dtype)
