"""Merged tokens: exact where tokens are equal, better than plainer ways where they are not."""

from __future__ import annotations

import math

import pytest
import torch
from refusal import sentence

from retrieval_core.bank.site_bank import Bank, SiteBank, project
from retrieval_core.bank.token_budget import limit_tokens
from retrieval_core.bank.tokens import EncodedReference, Tokens, gather, stack
from retrieval_core.network.retrieval_site import RetrievalSite

DIM = 16


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def site(width: int = DIM) -> RetrievalSite:
    made = RetrievalSite(width, 2).eval().requires_grad_(False)
    made.initialise(torch.Generator().manual_seed(0))
    made.zero_conv.weight.copy_(torch.eye(width)[..., None, None])
    made.null_key.weight.copy_(rand(1, width, seed=99))
    return made


def reference(tokens: torch.Tensor, weight: float = 1.0) -> EncodedReference:
    """Of keys and values side by side, [N, 2 * DIM]."""
    return EncodedReference({"s": torch.stack(tokens.split(DIM, 1))}, weight)


def clustered(count: int, centres: int, spread: float, seed: int = 0) -> torch.Tensor:
    """[count, 2 * DIM]: keys and values that scatter around a few centres, as features do."""
    middles = rand(centres, 2 * DIM, seed=seed)
    which = torch.randint(centres, (count,), generator=torch.Generator().manual_seed(seed))
    return middles[which] + spread * rand(count, 2 * DIM, seed=seed + 1)


def bank_of(*references: EncodedReference, budget: int | None = None) -> Bank:
    return project(gather(references), {"s": site()}, budget)


def retrieved(bank: Bank, h: torch.Tensor | None = None) -> torch.Tensor:
    return site()(rand(2, DIM, 5, 5, seed=7) if h is None else h, bank.sites["s"])


def test_a_bank_within_the_budget_is_itself():
    tokens = gather([reference(rand(30, 2 * DIM))])
    assert limit_tokens(tokens.sites["s"], 30) is tokens.sites["s"]
    assert project(Tokens(), {}, 5).empty


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_the_budget_bounds_the_tokens_of_all_references_together(budget):
    four = (reference(rand(50, 2 * DIM, seed=i)) for i in range(4))
    limited = bank_of(*four, budget=budget)
    kept = limited.sites["s"]
    assert kept.keys.shape == kept.values.shape == (1, budget + 1, DIM)
    assert kept.bias.shape == (1, budget + 1) and kept.owner.shape == (budget + 1,)
    assert limited.references == 4 and int(kept.owner[0]) == -1 and (kept.owner[1:] >= 0).all()
    assert float(kept.bias[0, 0]) == 0.0
    # Every token is in exactly one cluster.
    assert float(kept.bias[0, 1:].exp().sum()) == pytest.approx(200, rel=1e-5)


def test_equal_tokens_merge_without_loss():
    few = rand(10, 2 * DIM)
    repeats = [3, 1, 1, 5, 2, 1, 1, 4, 1, 1]
    many = few.repeat_interleave(torch.tensor(repeats), 0)
    limited = bank_of(reference(many), budget=10)
    assert sorted(limited.sites["s"].bias[0, 1:].exp().round().int().tolist()) == sorted(repeats)
    torch.testing.assert_close(retrieved(limited), retrieved(bank_of(reference(many))))


def test_weights_are_carried_as_mass():
    """Equal tokens of weights a and b are one of weight a + b; it belongs to the heavier one."""
    tokens = rand(8, 2 * DIM)
    both = reference(tokens, 0.25), reference(tokens, 1.5)
    two, limited = bank_of(*both), bank_of(*both, budget=8)
    kept = limited.sites["s"]
    torch.testing.assert_close(kept.bias[0, 1:], torch.full((8,), math.log(1.75)))
    assert kept.owner.tolist() == [-1] + [1] * 8
    torch.testing.assert_close(retrieved(limited), retrieved(bank_of(reference(tokens, 1.75))))
    torch.testing.assert_close(retrieved(limited), retrieved(two))


def test_merging_is_the_weighted_mean_of_each_cluster():
    a, b = rand(1, 2 * DIM), rand(1, 2 * DIM, seed=1) + 20
    near = [a, a + 0.01, b, b + 0.02, b - 0.01]
    kept = bank_of(reference(torch.cat(near)), budget=2).sites["s"]
    order = kept.keys[0, 1:, 0].argsort()
    tokens = torch.cat([kept.keys, kept.values], 2)[0, 1:][order]
    expected = torch.cat([a + 0.005, b + 0.01 / 3])
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    assert kept.bias[0, 1:][order].exp().round().tolist() == [2, 3]


def error(limited: Bank, whole: Bank) -> float:
    expected = retrieved(whole)
    return float((retrieved(limited) - expected).norm() / expected.norm())


def chosen(whole: Bank, index: torch.Tensor) -> Bank:
    """A random choice of the tokens, each standing for equally many."""
    kept, count = whole.sites["s"], whole.sites["s"].keys.shape[1] - 1
    index = torch.cat([torch.tensor([0]), index + 1])
    bias = torch.full((1, len(index)), math.log(count / (len(index) - 1)))
    bias[0, 0] = 0
    merged = SiteBank(kept.keys[:, index], kept.values[:, index], bias, kept.owner[index])
    return Bank({"s": merged}, whole.references)


def pooled(whole: Bank, run: int) -> Bank:
    """Means of runs of neighbours."""
    kept = whole.sites["s"]
    keys, values = (t[:, 1:].unflatten(1, (-1, run)).mean(2) for t in (kept.keys, kept.values))
    bias = torch.full((1, 1 + keys.shape[1]), math.log(run))
    bias[0, 0] = 0
    merged = SiteBank(
        torch.cat([kept.keys[:, :1], keys], 1),
        torch.cat([kept.values[:, :1], values], 1),
        bias,
        kept.owner[: 1 + keys.shape[1]],
    )
    return Bank({"s": merged}, whole.references)


def test_it_loses_less_than_random_choice_and_pooling():
    references = [reference(clustered(64, 20, 0.2, seed)) for seed in (0, 0, 3, 3)]
    whole = bank_of(*references)
    ours = error(bank_of(*references, budget=64), whole)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    assert ours < 0.5 * error(pooled(whole, 4), whole)
    assert ours < 0.5 * error(chosen(whole, order[:64]), whole)
    assert error(bank_of(*references, budget=128), whole) < ours


def test_features_merge_before_they_are_projected():
    """The same result as merging keys and values by the same clusters: both are linear."""
    layer, features = site(), clustered(200, 12, 0.3)[:, :DIM]
    tokens = gather([EncodedReference({"s": features[None]})])
    limited = project(tokens, {"s": layer}, 30).sites["s"]
    normed = layer.normed(features)
    projected = torch.stack(layer.project(normed))
    given = gather([EncodedReference({"s": normed[None]})]).sites["s"]
    kept = limit_tokens(given, 30)
    torch.testing.assert_close(limited.keys[:, 1:], layer.project(kept.parts[:, 0])[0])
    torch.testing.assert_close(limited.bias[:, 1:], kept.bias)
    # Every merged token is the mean of the tokens nearest to it, and so are its key and value.
    labels = torch.cdist(normed, kept.parts[0, 0]).argmin(1)
    for part, found in zip(projected, (limited.keys, limited.values), strict=True):
        means = torch.stack([part[labels == i].mean(0) for i in range(30)])
        torch.testing.assert_close(found[0, 1:], means, rtol=1e-4, atol=1e-4)
    whole = project(tokens, {"s": layer})
    assert error(Bank({"s": limited}, 1), whole) < 0.5 * error(pooled(whole, 8), whole)


def test_only_what_is_left_is_projected():
    seen = []

    class Layer(RetrievalSite):
        def project(self, normed):
            seen.append(normed.shape)
            return super().project(normed)

    layer = Layer(DIM, 2).requires_grad_(False)
    four = gather([EncodedReference({"s": rand(1, 50, DIM, seed=i)}) for i in range(4)])
    for budget, left in ((None, 200), (20, 20), (500, 200)):
        assert project(four, {"s": layer}, budget).sites["s"].keys.shape == (1, left + 1, DIM)
    assert seen == [(1, 200, DIM), (1, 20, DIM), (1, 200, DIM)]


def test_it_tells_how_far_it_is_and_can_be_interrupted():
    tokens = gather([reference(rand(30, 2 * DIM))])
    tokens = Tokens({"a": tokens.sites["s"], "b": tokens.sites["s"]}, 1)
    told = []
    project(tokens, None, 5, on_site=lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]

    def stop(done, count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        project(tokens, None, 5, on_site=stop)


def test_the_same_references_give_the_same_tokens():
    three = [reference(clustered(80, 9, 0.4, seed)) for seed in range(3)]
    first, second = (bank_of(*three, budget=40).sites["s"] for _ in range(2))
    assert torch.equal(first.keys, second.keys) and torch.equal(first.bias, second.bias)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_type_and_wide_features_are_kept(parts):
    layer = site(320).half()
    tokens = gather([EncodedReference({"s": rand(parts, 40, 320).half()})])
    kept = project(tokens, {"s": layer}, 12).sites["s"]
    assert kept.keys.dtype == kept.values.dtype == kept.bias.dtype == torch.float16
    assert kept.keys.shape == (1, 13, 320) and kept.keys.isfinite().all()


def test_a_bank_without_null_tokens():
    kept = project(gather([reference(rand(20, 2 * DIM))]), None, 6).sites["s"]
    assert kept.keys.shape == (1, 6, DIM) and (kept.owner == 0).all()


def test_banks_side_by_side_are_limited_each_for_itself_and_masked_tokens_count_for_nothing():
    keys = torch.stack([clustered(60, 8, 0.1, seed)[:, :DIM].view(2, 30, DIM) for seed in (0, 5)])
    tokens = torch.stack([keys, keys + 1], 2)
    keep = torch.ones(2, 2, 30, dtype=torch.bool)
    keep[1, 0] = False
    keep[1, 1, 4:] = False  # four tokens are left of the second bank
    layers = {"s": site()}
    both = project(stack({"s": tokens}, {"s": keep}), layers, 10)
    assert both.sites["s"].keys.shape == (2, 11, DIM)
    h = rand(2, DIM, 3, 3, seed=7)
    found = retrieved(both, h)
    first = project(stack({"s": tokens[:1]}), layers, 10)
    torch.testing.assert_close(found[:1], retrieved(first, h[:1]))
    four = project(gather([EncodedReference({"s": tokens[1, 1, :, :4]})]), layers)
    torch.testing.assert_close(found[1:], retrieved(four, h[1:]))
    shares = site().shares(h, both.sites["s"], 2)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 3, 3))
    assert float(shares[1, 1].max()) == 0.0 and float(shares[1, 2].min()) > 0


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_below_one_is_refused_in_one_sentence(budget):
    tokens = gather([reference(rand(4, 2 * DIM))])
    assert str(budget) in sentence(limit_tokens, tokens.sites["s"], budget)
    assert str(budget) in sentence(project, tokens, None, budget)
