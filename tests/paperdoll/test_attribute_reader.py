"""The attribute loss: against a plain formulation, and what it leaves out."""

from __future__ import annotations

import pytest
import torch
from batched_tokens import batch_tokens

from retrieval_core.bank.site_bank import make_bank
from retrieval_core.network.retrieval_site import RetrievalSite
from retrieval_core.paperdoll.attributes import AttributeReader
from retrieval_core.paperdoll.batches import READ, RetrievalBatches, render_characters
from retrieval_core.paperdoll.judge import ATTRIBUTES, index_truth

GROUPS, REFERENCES, HEIGHT, WIDTH, PARTS, CHANNELS, HEADS = 2, 2, 5, 3, 3, 8, 2
SIZES = {"hair": (1, 4), "upper": (2, 3)}


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(PARTS, (rows, HEIGHT, WIDTH), generator=generator).to(torch.uint8)


def bank_of(layer, keep=None):
    features = rand(GROUPS, REFERENCES, 1, HEIGHT * WIDTH, CHANNELS, seed=20)
    return make_bank(batch_tokens({"a": features}, keep), {"a": layer}, {"a": 1})


def example(pool=1, keep=None):
    layer = RetrievalSite(CHANNELS, HEADS, pool=pool).double()
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(rand(*parameter.shape, seed=i))
    torch.manual_seed(0)
    reader = AttributeReader({"a": CHANNELS}, SIZES).double()
    h = rand(2 * GROUPS, CHANNELS, HEIGHT, WIDTH, seed=30)
    truths = torch.tensor([[0, 2], [0, 2], [3, 1], [3, 1]])
    target, given = labels(2 * GROUPS, 1), labels(GROUPS * REFERENCES, 2)
    return layer, bank_of(layer, keep), reader, h, target, given, truths


def loss(layer, bank, reader, h, target, given, truths):
    return reader.loss({"a": layer}, {"a": h}, bank, target, given, PARTS, truths)


def retrieved_at(layer, h, keys, values):
    """[H, W, C] for one row's features h [C, H, W]: block by block, head by head, laid out again
    by bilinear interpolation between the blocks' centres."""
    pool, dim = layer.pool, CHANNELS // HEADS
    rows, columns = -(-HEIGHT // pool), -(-WIDTH // pool)
    found = torch.zeros(rows, columns, CHANNELS, dtype=torch.float64)
    for y in range(rows):
        for x in range(columns):
            block = h[:, y * pool : (y + 1) * pool, x * pool : (x + 1) * pool].mean((1, 2))
            q = layer.to_q(layer.norm_query(block))
            for head in range(HEADS):
                part = slice(head * dim, (head + 1) * dim)
                weights = (keys[:, part] @ q[part] / dim**0.5).softmax(0)
                found[y, x, part] = weights @ values[:, part]

    def between(index, count):
        at = min(max((index + 0.5) / pool - 0.5, 0), count - 1)
        return int(at), min(int(at) + 1, count - 1), at - int(at)

    out = torch.zeros(HEIGHT, WIDTH, CHANNELS, dtype=torch.float64)
    for y in range(HEIGHT):
        top, bottom, down = between(y, rows)
        for x in range(WIDTH):
            left, right, across = between(x, columns)
            upper = (1 - across) * found[top, left] + across * found[top, right]
            lower = (1 - across) * found[bottom, left] + across * found[bottom, right]
            out[y, x] = (1 - down) * upper + down * lower
    return out


@torch.no_grad()
def plain(layer, bank, reader, h, target, given, truths, keep=None):
    """Target by target and attribute by attribute; masked tokens are left out beforehand."""
    site = bank.sites["a"]
    weight, bias = reader.heads["a"].weight, reader.heads["a"].bias
    means, start = [], 0
    for index, (part, count) in enumerate(SIZES.values()):
        rows = []
        for row in range(len(h)):
            group = row // 2
            usable = torch.ones(REFERENCES * HEIGHT * WIDTH, dtype=torch.bool)
            if keep is not None:
                usable = keep["a"][group].flatten()
            shown = given.view(GROUPS, -1)[group][usable]
            usable = torch.cat([torch.tensor([True]), usable])  # the null token
            keys, values = site.keys[group][usable], site.values[group][usable]
            inside = target[row] == part
            if not bool((shown == part).any()) or not bool(inside.any()):
                continue
            mean = retrieved_at(layer, h[row], keys, values)[inside].mean(0)
            mean = (mean - mean.mean()) / (mean.var(correction=0) + 1e-5).sqrt()
            logits = weight[start : start + count] @ mean + bias[start : start + count]
            rows.append(-logits.log_softmax(0)[truths[row, index]])
        means.append(torch.stack(rows).mean() if rows else torch.zeros((), dtype=torch.float64))
        start += count
    return torch.stack(means).mean()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pool", [1, 2])
def test_it_is_the_cross_entropy_of_what_was_retrieved_at_each_part(pool, masked):
    keep = None
    if masked:
        keep = {"a": rand(GROUPS, REFERENCES, HEIGHT * WIDTH, seed=9) > 0}
    case = example(pool, keep)
    torch.testing.assert_close(loss(*case).detach(), plain(*case, keep), rtol=1e-9, atol=1e-9)


def test_a_part_that_no_reference_shows_is_not_asked_for():
    layer, bank, reader, h, target, given, truths = example()
    given = given.clone()
    given[:2][given[:2] == 1] = 0  # the first bank shows no hair
    ours = loss(layer, bank, reader, h, target, given, truths)
    torch.testing.assert_close(ours.detach(), plain(layer, bank, reader, h, target, given, truths))
    wrong = truths.clone()
    wrong[:2, 0] = 1
    assert torch.equal(ours, loss(layer, bank, reader, h, target, given, wrong))
    wrong[2:, 0] = 1
    assert not torch.equal(ours, loss(layer, bank, reader, h, target, given, wrong))


def test_references_that_were_all_dropped_cost_nothing_and_leave_gradients_finite():
    layer, _, reader, h, target, given, truths = example()
    dropped = {"a": torch.zeros(GROUPS, REFERENCES, HEIGHT * WIDTH, dtype=torch.bool)}
    value = loss(layer, bank_of(layer, dropped), reader, h, target, given, truths)
    value.backward()
    assert float(value.detach()) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_it_reaches_the_values_and_the_attention():
    case = example()
    loss(*case).backward()
    layer = case[0]
    for weight in (layer.to_q.weight, layer.to_k.weight, layer.to_v.weight):
        assert weight.grad.abs().sum() > 0
    assert layer.zero_conv.weight.grad is None


def test_batches_name_the_targets_attributes():
    characters = render_characters(5, 4)
    batch = RetrievalBatches(characters, 4, 1, 0.5).batch(0)
    assert batch.truths.shape == (16, len(READ))
    # The four targets of one character share what references give.
    for rows in batch.truths.view(4, 4, -1):
        assert (rows == rows[:1]).all()
    columns = [list(ATTRIBUTES).index(name) for name in READ]
    truths = [index_truth(renderings[0].figure) for renderings in characters]
    known = {tuple(truth[column] for column in columns) for truth in truths}
    assert {tuple(row) for row in batch.truths.tolist()} == known
