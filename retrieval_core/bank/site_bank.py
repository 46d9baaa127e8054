"""The bank: keys and values of every site, of all references and the null token (DESIGN §3).

K_s = W_k LN(f_s), V_s = W_v LN(f_s). Both are linear in LN(f_s), so tokens are merged to the budget
before: the mean of merged tokens has their mean key and mean value. Only the merged tokens are then
projected. A `Bank` is made once and only read while sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..network.controlnet import RetrievalControlNet
from ..network.retrieval_site import RetrievalSite
from .token_budget import Budget, choose_budgets, limit_tokens
from .tokens import SiteTokens, Tokens

_QUERIES = 64  # tokens that importance is measured with


@dataclass(frozen=True, eq=False)
class SiteBank:
    """Keys and values [G, N, D] of one site for a batch of G banks, a null token first if any.

    Attributes:
        bias: additive on the logits, [G, N] (log weights, -inf for what is masked), or None
            where it would be all zero.
        owner: index of the reference that each token belongs to, [N], or [G, N] where rows
            differ; -1 for the null token.
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
    """All sites of a batch of banks; see `SiteBank`.

    `references` is the number of references with a weight above 0. A bank of none is never
    attended to, so that sampling is bit for bit the base model's.
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


def make_network_bank(
    network: RetrievalControlNet, tokens: Tokens, budget: Budget = None, **kw: Any
) -> Bank:
    """`make_bank` with the layers of a trained network; `kw`: device, on_site."""
    factors = network.config.site_downsampling()
    return make_bank(tokens, network.retrieval, factors, budget, **kw)


def make_bank(
    tokens: Tokens,
    layers: Mapping[str, RetrievalSite] | None,
    factors: Mapping[str, int],
    budget: Budget = None,
    device: torch.device | str | None = None,
    on_site: Callable[[int, int], None] | None = None,
) -> Bank:
    """Computes keys and values of all sites.

    The null token cannot be masked, so a bank whose references are all dropped retrieves nothing.

    Args:
        layers: of each site; None in the training-free mode, where the tokens are keys and values
            and there is no null token.
        factors: site -> latent pixels that a token spans along an edge.
        budget: the most tokens at a site, null token aside (`choose_budgets`).
        device: of the computation, None for the tokens' own; the bank is on the tokens' device.
        on_site: called with (sites done, sites in all); may raise to interrupt.
    """
    budgets, sites = choose_budgets(budget, factors, tokens.latent_size), {}
    for name, given in tokens.sites.items():
        home, most = given.tokens.device, budgets[name]
        over = most is not None and given.tokens.shape[2] > most
        if device is not None and (layers is not None or over):
            given = given.to(device)
        if layers is not None:
            made = _project(given, layers[name], most if over else None)
        else:
            limited = limit_tokens(given, most) if over else given
            made = SiteBank(*limited.tokens.unbind(1), limited.bias, limited.owner)
        sites[name] = made.to(home, made.keys.dtype)
        if on_site is not None:
            on_site(len(sites), len(tokens.sites))
    return Bank(sites, tokens.references)


def _project(given: SiteTokens, layer: RetrievalSite, budget: int | None) -> SiteBank:
    """Keys and values of features [G, 1, N, D], merged to the budget, after the null token's."""
    features = given.tokens[:, 0]
    normed = layer.norm_reference(features)
    given = replace(given, tokens=normed[:, None])
    if budget is not None:
        given = limit_tokens(
            given, budget, lambda *projected: measure_attention(layer, features, given, *projected)
        )
        normed = given.tokens[:, 0]
    keys, values = layer.to_k(normed), layer.to_v(normed)
    null = layer.embed_null(keys).expand(len(keys), 1, -1)
    bias = None if given.bias is None else F.pad(given.bias, (1, 0))
    return SiteBank(
        torch.cat([null, keys], 1),
        torch.cat([torch.zeros_like(null), values], 1),
        bias,
        F.pad(given.owner, (1, 0), value=-1),
    )


def measure_attention(
    layer: RetrievalSite, features: Tensor, given: SiteTokens, projected: Tensor, basis: Tensor
) -> Tensor:
    """Attention that each token draws from the references' own content, [G, N].

    The mean over heads and over queries from a random choice of the tokens, by their weights. Keys
    are those of the projected tokens: W_k B (B^T x), W_k applied to the basis B only.

    Args:
        features: f_s of all tokens [G, N, D]. given: LN(f_s). projected, basis: [G, N, F], [D, F].
    """
    weights, count = given.weights, features.shape[1]
    asked = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:_QUERIES]
    asked = asked.to(features.device)
    share = weights[:, None, asked]
    q = layer.to_q(layer.norm_query(features[:, asked]))
    k = layer.to_k(basis.T.to(features))
    k = torch.cat([k, layer.embed_null(k)])  # the null token is on an axis of its own
    projected = F.pad(projected, (0, 1, 1, 0))
    projected[:, 0, -1] = 1
    q, k = (rearrange(t.float(), "... n (h d) -> h ... n d", h=layer.heads) for t in (q, k))
    bias = F.pad(weights.log(), (1, 0))[:, None]
    shares = torch.zeros_like(bias)
    for query, key in zip(q, k, strict=True):  # one head at a time bounds memory
        logits = query @ key.T / key.shape[1] ** 0.5 @ projected.mT + bias
        shares += share @ logits.softmax(-1)
    return shares[:, 0, 1:] / (layer.heads * share.sum(-1).clamp_min(1e-12))
