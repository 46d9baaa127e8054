"""The attribute loss: against a plain formulation, and what it leaves out."""

from __future__ import annotations

import pytest
import torch

from retrieval_core.bank.site_bank import project
from retrieval_core.bank.tokens import stack
from retrieval_core.network.retrieval_site import RetrievalSite
from retrieval_core.paperdoll.batches import READ, RetrievalBatches, render_characters
from retrieval_core.paperdoll.judge import ATTRIBUTES
from retrieval_core.training.attributes import AttributeReader, deeper_sites

GROUPS, REFERENCES, EDGE, PARTS, WIDTH = 2, 2, 4, 3, 8
SIZES = {"hair": (1, 4), "upper": (2, 3)}


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(PARTS, (rows, EDGE, EDGE), generator=generator).to(torch.uint8)


@pytest.fixture
def example():
    layer = RetrievalSite(WIDTH, 2).double()
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(rand(*parameter.shape, seed=i))
    bank = project(
        stack({"a": rand(GROUPS, REFERENCES, 2, EDGE * EDGE, WIDTH, seed=20)}), {"a": layer}
    )
    torch.manual_seed(0)
    reader = AttributeReader({"a": WIDTH}, SIZES).double()
    h = rand(2 * GROUPS, WIDTH, EDGE, EDGE, seed=30)
    truths = torch.tensor([[0, 2], [0, 2], [3, 1], [3, 1]])
    return layer, bank, reader, h, labels(2 * GROUPS, 1), labels(GROUPS * REFERENCES, 2), truths


def loss(layer, bank, reader, h, target, given, truths):
    return reader.loss({"a": layer}, {"a": h}, bank, target, given, PARTS, truths)


def plain(layer, bank, reader, h, target, given, truths):
    """Target by target and attribute by attribute."""
    retrieved = layer.attended(h, bank.sites["a"])
    weight, bias = reader.heads["a"].weight, reader.heads["a"].bias
    means, start = [], 0
    for index, (part, count) in enumerate(SIZES.values()):
        rows = []
        for row in range(len(h)):
            shown = given.view(GROUPS, -1)[row // 2]
            places = target[row].flatten() == part
            if not bool((shown == part).any()) or not bool(places.any()):
                continue
            mean = retrieved[row][places].mean(0)
            mean = (mean - mean.mean()) / (mean.var(correction=0) + 1e-5).sqrt()
            logits = weight[start : start + count] @ mean + bias[start : start + count]
            rows.append(-logits.log_softmax(0)[truths[row, index]])
        means.append(torch.stack(rows).mean() if rows else torch.zeros((), dtype=torch.float64))
        start += count
    return torch.stack(means).mean()


def test_it_is_the_cross_entropy_of_what_was_retrieved_at_each_part(example):
    torch.testing.assert_close(loss(*example), plain(*example), rtol=1e-9, atol=1e-9)


def test_a_part_that_no_reference_shows_is_not_asked_for(example):
    layer, bank, reader, h, target, given, truths = example
    given = given.clone()
    given[:2][given[:2] == 1] = 0  # the first bank shows no hair
    ours = loss(layer, bank, reader, h, target, given, truths)
    torch.testing.assert_close(ours, plain(layer, bank, reader, h, target, given, truths))
    wrong = truths.clone()
    wrong[:2, 0] = 1
    assert torch.equal(ours, loss(layer, bank, reader, h, target, given, wrong))
    wrong[2:, 0] = 1
    assert not torch.equal(ours, loss(layer, bank, reader, h, target, given, wrong))


def test_references_that_were_all_dropped_cost_nothing_and_leave_gradients_finite(example):
    layer, _, reader, h, target, given, truths = example
    tokens = {"a": rand(GROUPS, REFERENCES, 2, EDGE * EDGE, WIDTH, seed=20)}
    dropped = {"a": torch.zeros(GROUPS, REFERENCES, EDGE * EDGE, dtype=torch.bool)}
    bank = project(stack(tokens, dropped), {"a": layer})
    value = loss(layer, bank, reader, h, target, given, truths)
    value.backward()
    assert float(value.detach()) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_it_reaches_the_values_and_the_attention(example):
    layer, _, reader, h, target, given, truths = example
    features = rand(GROUPS, REFERENCES, 1, EDGE * EDGE, WIDTH, seed=5)
    bank = project(stack({"a": features}), {"a": layer})
    loss(layer, bank, reader, h, target, given, truths).backward()
    for weight in (layer.to_q.weight, layer.to_k.weight, layer.to_v.weight):
        assert weight.grad.abs().sum() > 0
    assert layer.zero_conv.weight.grad is None


def test_the_deeper_sites_are_all_but_the_first_two():
    assert deeper_sites(["input_0", "input_1", "input_2", "middle"]) == ["input_2", "middle"]


def test_batches_name_the_targets_attributes():
    characters = render_characters(5, 4)
    batch = RetrievalBatches(characters, 4, 1).batch(0)
    assert batch.truths.shape == (16, len(READ))
    # The four targets of one character share what references give.
    for rows in batch.truths.view(4, 4, -1):
        assert (rows == rows[:1]).all()
    columns = [list(ATTRIBUTES).index(name) for name in READ]
    known = {tuple(row) for row in characters.truths[:, 0, columns].tolist()}
    assert {tuple(row) for row in batch.truths.tolist()} == known
