"""The token budget: exact where tokens are equal, by importance and likeness where they are not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from batched_tokens import batch_tokens
from refusal import sentence

from retrieval_core.bank import site_bank, token_budget
from retrieval_core.bank.site_bank import Bank, SiteBank, make_bank, measure_attention
from retrieval_core.bank.token_budget import (
    AUTOMATIC,
    LEAST_AUTOMATIC,
    check_budget,
    choose_budgets,
    choose_tokens,
    limit_tokens,
    project_tokens,
)
from retrieval_core.bank.tokens import (
    EncodedReference,
    SiteTokens,
    Tokens,
    join_references,
)
from retrieval_core.network.retrieval_site import RetrievalSite
from retrieval_core.network.unet import SD15, SDXL
from retrieval_core.sampling.applications import Retrieval
from retrieval_core.sampling.attention_map import measure_shares
from retrieval_core.sampling.frozen_site import freeze_site

DIM = 16


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def site(width: int = DIM) -> RetrievalSite:
    made = RetrievalSite(width, 2).eval().requires_grad_(False)
    made.initialise(torch.Generator().manual_seed(0))
    made.zero_conv.weight.copy_(torch.eye(width)[..., None, None])
    made.null_key.weight.copy_(rand(1, width, seed=99))
    return made


def reference(features: torch.Tensor, weight: float = 1.0) -> EncodedReference:
    """Of features [N, D]."""
    return EncodedReference({"s": features[None]}, weight)


def clustered(count: int, centres: int, spread: float, seed: int = 0) -> torch.Tensor:
    """[count, DIM] that scatter around a few centres, as features do."""
    middles = rand(centres, DIM, seed=seed)
    which = torch.randint(centres, (count,), generator=torch.Generator().manual_seed(seed))
    return middles[which] + spread * rand(count, DIM, seed=seed + 1)


def bank_of(*references: EncodedReference, budget: int | None = None) -> Bank:
    return make_bank(join_references(references), {"s": site()}, {"s": 1}, budget)


def site_tokens(tokens: torch.Tensor, bias: torch.Tensor | None = None) -> SiteTokens:
    """Of [N, D], or of keys and values [2, N, D], as one bank."""
    tokens = tokens.expand(1, *tokens.shape) if tokens.ndim == 3 else tokens[None, None]
    return SiteTokens(tokens, bias, torch.arange(tokens.shape[2]))


def retrieved(bank: Bank, h: torch.Tensor | None = None) -> torch.Tensor:
    held = bank.sites["s"]
    h = rand(2, DIM, 5, 5, seed=7) if h is None else h
    return site()(h, held.keys, held.values, held.bias)


# How many tokens a site may have


@pytest.mark.parametrize(
    ("config", "latent_size", "expected"),
    [
        (SD15, (64, 64), {1: 32 * 32, 2: 32 * 32, 4: 512, 8: 512}),
        (SDXL, (128, 128), {1: 64 * 64, 2: 64 * 64, 4: 32 * 32}),
        (SDXL, (256, 95), {1: 128 * 48, 2: 128 * 48, 4: 64 * 24}),
        (SD15, (0, 0), dict.fromkeys((1, 2, 4, 8), 512)),
    ],
)
def test_the_automatic_budget_scales_with_the_sites_resolution_and_the_latents_size(
    config, latent_size, expected
):
    """A token for each position; at half the latent's resolution at most, and 512 at least."""
    factors = config.site_downsampling()
    found = choose_budgets(AUTOMATIC, factors, latent_size)
    assert found == {name: expected[factor] for name, factor in factors.items()}
    assert LEAST_AUTOMATIC == 512


def test_a_budget_is_one_number_for_all_sites_or_numbers_by_site_or_all_tokens():
    factors = {"a": 1, "b": 4}
    assert choose_budgets(7, factors, (64, 64)) == {"a": 7, "b": 7}
    assert choose_budgets(None, factors, (64, 64)) == {"a": None, "b": None}
    assert choose_budgets({"b": 3}, factors, (64, 64)) == {"a": None, "b": 3}


def test_the_automatic_budget_is_that_of_the_largest_references_latent():
    factors, layers = {"fine": 1, "coarse": 4}, {"fine": site(), "coarse": site()}

    def encoded(edge, weight=1.0):
        tokens = {s: rand(1, (edge // f) ** 2, DIM, seed=edge + f) for s, f in factors.items()}
        return EncodedReference(tokens, weight, latent_size=(edge, edge))

    small, large = encoded(24), encoded(48)
    bank = make_bank(join_references([small, large]), layers, factors, AUTOMATIC)
    assert bank.sites["fine"].keys.shape[1] == 24 * 24 + 1
    assert bank.sites["coarse"].keys.shape[1] == 6 * 6 + 12 * 12 + 1  # below 512: all are kept
    bank = make_bank(join_references([small, encoded(48, 0)]), layers, factors, AUTOMATIC)
    assert bank.sites["fine"].keys.shape[1] == LEAST_AUTOMATIC + 1


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_below_one_is_refused_in_one_sentence(budget):
    assert str(budget) in sentence(check_budget, budget)
    for allowed in (1, None, AUTOMATIC, {"a": 3}):
        check_budget(allowed)


# What merging keeps


def test_a_bank_within_the_budget_is_that_without_a_budget():
    features = rand(30, DIM)
    whole, limited = (bank_of(reference(features), budget=b).sites["s"] for b in (None, 30))
    assert torch.equal(limited.keys, whole.keys) and torch.equal(limited.values, whole.values)
    assert limited.bias is None and torch.equal(limited.owner, whole.owner)
    assert make_bank(Tokens(), {}, {}, 5).empty


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_the_budget_bounds_the_tokens_of_all_references_together(budget):
    limited = bank_of(*(reference(rand(50, DIM, seed=i)) for i in range(4)), budget=budget)
    kept = limited.sites["s"]
    assert kept.keys.shape == kept.values.shape == (1, budget + 1, DIM)
    assert kept.bias.shape == (1, budget + 1) and kept.owner.shape == (budget + 1,)
    assert limited.references == 4 and int(kept.owner[0]) == -1 and (kept.owner[1:] >= 0).all()
    assert float(kept.bias[0, 0]) == 0.0
    # Every token is merged into exactly one.
    assert float(kept.bias[0, 1:].exp().sum()) == pytest.approx(200, rel=1e-5)


def test_equal_tokens_merge_without_loss():
    few = rand(10, DIM)
    repeats = [3, 1, 1, 5, 2, 1, 1, 4, 1, 1]
    many = few.repeat_interleave(torch.tensor(repeats), 0)
    limited = bank_of(reference(many), budget=10)
    assert sorted(limited.sites["s"].bias[0, 1:].exp().round().int().tolist()) == sorted(repeats)
    torch.testing.assert_close(retrieved(limited), retrieved(bank_of(reference(many))))


def test_weights_are_carried_as_mass():
    """Equal tokens of weights a and b are one of weight a + b; it belongs to the heavier one."""
    tokens = rand(8, DIM)
    both = reference(tokens, 0.25), reference(tokens, 1.5)
    two, limited = bank_of(*both), bank_of(*both, budget=8)
    kept = limited.sites["s"]
    torch.testing.assert_close(kept.bias[0, 1:], torch.full((8,), math.log(1.75)))
    assert kept.owner.tolist() == [-1] + [1] * 8
    torch.testing.assert_close(retrieved(limited), retrieved(bank_of(reference(tokens, 1.75))))
    torch.testing.assert_close(retrieved(limited), retrieved(two))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("measured", [False, True])
def test_a_merged_token_is_the_mean_by_importance_of_the_tokens_nearest_to_one_kept(
    parts, measured
):
    """Of well separated clusters one token each is kept; the rest is computed in float64."""
    middles = 20 * torch.eye(DIM)[:5]
    cluster = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4, 0, 2, 4, 4])
    tokens = torch.stack([middles[cluster] + rand(12, DIM, seed=i) for i in range(parts)])
    weights = torch.rand(12, generator=torch.Generator().manual_seed(3)) + 0.1
    drawn = torch.rand(12, generator=torch.Generator().manual_seed(4)) + 0.1
    given = site_tokens(tokens, weights.log()[None])
    kept = limit_tokens(given, 5, (lambda *projected: drawn[None]) if measured else None)
    importance = (drawn if measured else weights).double()
    assert sorted(cluster[kept.owner].tolist()) == [0, 1, 2, 3, 4]
    for i, owner in enumerate(kept.owner.tolist()):
        member = cluster == cluster[owner]
        share = importance[member] / importance[member].sum()
        mean = (tokens.double()[:, member] * share[:, None]).sum(1)
        torch.testing.assert_close(kept.tokens[0, :, i].double(), mean, rtol=1e-5, atol=1e-5)
        mass = float(weights.double()[member].sum())
        assert float(kept.bias[0, i].exp()) == pytest.approx(mass, rel=1e-5)


def test_of_tokens_equally_far_apart_the_most_important_are_kept():
    corners = torch.eye(DIM)
    importance = torch.rand(1, DIM, generator=torch.Generator().manual_seed(0)) + 0.5
    kept, _ = choose_tokens(corners[None], importance, 6)
    assert sorted(kept[0].tolist()) == sorted(importance[0].topk(6).indices.tolist())


def test_of_tokens_equally_important_those_far_from_all_kept_are_kept():
    """Tight clusters of unequal sizes: none is left without a token."""
    cluster = torch.arange(64).repeat_interleave(torch.tensor([4, 1, 2, 3]).repeat(16))
    features = 3 * rand(64, DIM)[cluster] + 1e-3 * rand(160, DIM, seed=1)
    kept, labels = choose_tokens(features[None], torch.ones(1, 160), 64)
    assert sorted(cluster[kept[0]].tolist()) == list(range(64))
    assert torch.equal(cluster[kept[0]][labels[0]], cluster)


@pytest.mark.parametrize("chunk", [1 << 14, 17])
def test_every_token_goes_to_the_nearest_of_those_kept(monkeypatch, chunk):
    monkeypatch.setattr(token_budget, "_CHUNK", chunk)
    features, importance = rand(2, 90, DIM), rand(2, 90, seed=1).sigmoid()
    kept, labels = choose_tokens(features, importance, 13)
    for group in range(2):
        distance = torch.cdist(features[group].double(), features[group, kept[group]].double())
        assert torch.equal(labels[group], distance.argmin(1))
        assert len(set(kept[group].tolist())) == 13


def test_importance_is_the_attention_that_the_references_own_content_draws():
    """Against softmax(q K^T / sqrt(d) + log w) in float64, query by query and head by head; of so
    narrow tokens the projection loses nothing, and of so few each is a query."""
    layer, features, weights = site(), rand(2, 9, DIM), rand(2, 9, seed=1).exp()
    weights[1, 4:] = 0
    normed = layer.norm_reference(features)
    given = SiteTokens(normed[:, None], weights.log(), torch.arange(9))
    projected, (basis,) = project_tokens(given)
    found = measure_attention(layer, features, given, projected, basis)
    w = {name: value.double() for name, value in layer.state_dict().items()}
    null, half = w["null_key.weight"][0], DIM // 2
    for group in range(2):
        expected = torch.zeros(9, dtype=torch.float64)
        keys = [null, *(w["to_k.weight"] @ token for token in normed[group].double())]
        logs = [0.0, *weights[group].double().log()]
        for index in range(9):
            token = features[group, index].double()  # its LayerNorm is as it was initialised
            token = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
            query = w["to_q.weight"] @ token
            share = weights[group, index].double() / weights[group].double().sum() / 2
            for head in (slice(0, half), slice(half, DIM)):
                logits = [query[head] @ key[head] / half**0.5 for key in keys]
                logits = torch.stack([a + b for a, b in zip(logits, logs, strict=True)])
                expected += share * (logits.exp() / logits.exp().sum())[1:]
        torch.testing.assert_close(found[group].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_importance_of_wide_tokens_is_found_from_their_largest_directions():
    """Tokens that vary in 24 directions of 320: the projection to 32 finds these."""
    layer = site(320)
    features = rand(1, 200, 24) @ rand(24, 320, seed=1)
    given = SiteTokens(layer.norm_reference(features)[:, None], None, torch.arange(200))
    projected, (basis,) = project_tokens(given)
    assert projected.shape == (1, 200, 32)
    expected = given.tokens[:, 0]
    torch.testing.assert_close(projected @ basis.T, expected, rtol=0, atol=1e-3)
    exact = measure_attention(layer, features, given, expected, torch.eye(320))
    found = measure_attention(layer, features, given, projected, basis)
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-5)


def test_merging_by_importance_loses_less_than_by_the_weights_alone(monkeypatch):
    """All queries look for one direction, which few tokens have; the many others vary more."""
    layer, wanted = site(), rand(DIM, seed=2)
    layer.norm_query.weight.zero_()
    layer.norm_query.bias.copy_(wanted)
    walls = 2 * rand(3, DIM, seed=11).repeat_interleave(100, 0) + rand(300, DIM, seed=1)
    tokens = join_references([reference(torch.cat([walls, wanted + 0.3 * rand(30, DIM, seed=5)]))])

    def added(budget=None):
        held = make_bank(tokens, {"s": layer}, {"s": 1}, budget).sites["s"]
        return layer(rand(1, DIM, 2, 2), held.keys, held.values, held.bias)

    whole, by_importance = added(), added(40)
    monkeypatch.setattr(site_bank, "limit_tokens", lambda given, most, _: limit_tokens(given, most))
    assert (by_importance - whole).norm() < 0.7 * (added(40) - whole).norm()


def error(limited: Bank, whole: Bank) -> float:
    expected = retrieved(whole)
    return float((retrieved(limited) - expected).norm() / expected.norm())


def merged(whole: Bank, merge: Callable[[torch.Tensor], torch.Tensor]) -> Bank:
    """The bank with its tokens [N, D] merged otherwise, each standing for equally many."""
    held = whole.sites["s"]
    keys, values = (
        torch.cat([t[:, :1], merge(t[0, 1:])[None]], 1) for t in (held.keys, held.values)
    )
    share = (held.keys.shape[1] - 1) / (keys.shape[1] - 1)
    bias = torch.full(keys.shape[:2], math.log(share))
    bias[:, 0] = 0
    return Bank({"s": SiteBank(keys, values, bias, held.owner)}, whole.references)


def test_it_loses_less_than_random_choice_and_pooling():
    references = [reference(clustered(64, 20, 0.2, seed)) for seed in (0, 0, 3, 3)]
    whole = bank_of(*references)
    ours = error(bank_of(*references, budget=64), whole)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:64]
    neighbours = merged(whole, lambda tokens: tokens.unflatten(0, (-1, 4)).mean(1))
    assert ours < 0.5 * error(neighbours, whole)
    assert ours < 0.5 * error(merged(whole, lambda tokens: tokens[order]), whole)
    assert error(bank_of(*references, budget=128), whole) < ours


# How the bank is made


def test_features_merge_before_they_are_projected():
    """A merged token's key and value are W_k and W_v of one mean of LN(f); see the mean above."""
    layer, features = site(), clustered(200, 12, 0.3)
    tokens, seen = join_references([reference(features)]), []
    layer.to_v.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    limited = make_bank(tokens, {"s": layer}, {"s": 1}, 30).sites["s"]
    (means,) = seen
    assert means.shape == (1, 30, DIM)
    torch.testing.assert_close(limited.keys[:, 1:], means @ layer.to_k.weight.T)
    torch.testing.assert_close(limited.values[:, 1:], means @ layer.to_v.weight.T)
    normed = layer.norm_reference(features)[None]
    given = SiteTokens(normed[:, None], None, torch.zeros(200, dtype=torch.long))

    def measure(projected, basis):
        return measure_attention(layer, features[None], given, projected, basis)

    kept = limit_tokens(given, 30, measure)
    torch.testing.assert_close(means, kept.tokens[:, 0])
    torch.testing.assert_close(limited.bias[:, 1:], kept.bias)


def test_it_tells_how_far_it_is_and_can_be_interrupted():
    one = join_references([reference(rand(30, DIM))]).sites["s"]
    tokens, told = Tokens({"a": one, "b": one}, 1), []
    layers, factors = {"a": site(), "b": site()}, {"a": 1, "b": 1}
    make_bank(tokens, layers, factors, 5, on_site=lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]

    def stop(done, count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_bank(tokens, layers, factors, 5, on_site=stop)


def test_the_same_references_give_the_same_tokens():
    three = [reference(clustered(80, 9, 0.4, seed)) for seed in range(3)]
    first, second = (bank_of(*three, budget=40).sites["s"] for _ in range(2))
    assert torch.equal(first.keys, second.keys) and torch.equal(first.bias, second.bias)
    assert torch.equal(first.values, second.values) and torch.equal(first.owner, second.owner)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_type_and_wide_features_are_kept(parts):
    tokens = join_references([EncodedReference({"s": rand(parts, 40, 320).half()})])
    layers = {"s": site(320).half()} if parts == 1 else None
    kept = make_bank(tokens, layers, {"s": 1}, 12).sites["s"]
    assert kept.keys.dtype == kept.values.dtype == kept.bias.dtype == torch.float16
    assert kept.keys.shape == kept.values.shape == (1, 12 + (parts == 1), 320)
    assert all(t.isfinite().all() for t in (kept.keys, kept.values, kept.bias))


def test_keys_and_values_make_a_bank_without_null_token():
    """Of the training-free mode: they are merged as they are, by their weights."""
    tokens = join_references([EncodedReference({"s": rand(2, 20, DIM)}, 2.0)])
    kept = make_bank(tokens, None, {"s": 1}, 6).sites["s"]
    expected = limit_tokens(tokens.sites["s"], 6)
    assert kept.keys.shape == (1, 6, DIM) and (kept.owner == 0).all()
    assert torch.equal(torch.stack([kept.keys, kept.values], 1), expected.tokens)
    assert float(kept.bias.exp().sum()) == pytest.approx(40, rel=1e-5)


def test_banks_of_a_batch_are_limited_each_for_itself_and_masked_tokens_count_for_nothing():
    features = torch.stack([clustered(60, 8, 0.1, seed).view(2, 1, 30, DIM) for seed in (0, 5)])
    keep = torch.ones(2, 2, 30, dtype=torch.bool)
    keep[1, 0] = False
    keep[1, 1, 4:] = False  # four tokens are left of the second bank
    layers, factors = {"s": site()}, {"s": 1}
    both = make_bank(batch_tokens({"s": features}, {"s": keep}), layers, factors, 10)
    assert both.sites["s"].keys.shape == (2, 11, DIM)
    h = rand(2, DIM, 3, 3, seed=7)
    found = retrieved(both, h)
    first = make_bank(batch_tokens({"s": features[:1]}), layers, factors, 10)
    torch.testing.assert_close(found[:1], retrieved(first, h[:1]))
    four = bank_of(reference(features[1, 1, 0, :4]))
    torch.testing.assert_close(found[1:], retrieved(four, h[1:]))
    frozen = freeze_site(layers["s"], lambda layer: (layer.weight, layer.bias))
    shares = measure_shares(Retrieval(both, sites={"s": frozen}), "s", h, both.sites["s"], 2)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 3, 3))
    assert float(shares[1, 1].max()) == 0.0 and float(shares[1, 2].min()) > 0
