"""The correspondence loss: against a plain formulation, and the parts that it is told."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from batched_tokens import batch_tokens
from refusal import sentence

from retrieval_core.bank.site_bank import make_bank
from retrieval_core.data import Sample, cut_reference
from retrieval_core.data.augment import View
from retrieval_core.network.retrieval_site import RetrievalSite
from retrieval_core.paperdoll import draw
from retrieval_core.paperdoll.batches import PARTS_OF, RetrievalBatches, render_characters
from retrieval_core.paperdoll.world import (
    HAIR_COLOURS,
    Figure,
    random_identity,
    random_outfit,
    random_scene,
)
from retrieval_core.training import correspondence as c

GROUPS, REFERENCES, HEIGHT, WIDTH, PARTS, CHANNELS, HEADS = 2, 2, 5, 3, 3, 8, 2
POSITIONS = HEIGHT * WIDTH


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def site(pool=1):
    made = RetrievalSite(CHANNELS, HEADS, pool=pool).double()
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.copy_(rand(*parameter.shape, seed=i))
    return made


def labels(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(PARTS, (rows, HEIGHT, WIDTH), generator=generator).to(torch.uint8)


def bank_of(layer, features, keep=None):
    return make_bank(batch_tokens({"a": features}, keep), {"a": layer}, {"a": 1})


def example(keep=None, pool=1):
    layer = site(pool)
    bank = bank_of(layer, rand(GROUPS, REFERENCES, 1, POSITIONS, CHANNELS, seed=20), keep)
    return layer, bank, rand(2 * GROUPS, CHANNELS, HEIGHT, WIDTH, seed=30)


def loss(layer, bank, h, target, given, parts=PARTS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return c.correspondence_loss({"a": layer}, [h], bank, target, given, parts, generator)


@torch.no_grad()
def plain(layer, bank, h, target, given, keep=None):
    """Position by position, all of them; a pooled query is that of its block's mean."""
    keys, total, pool, dim = bank.sites["a"].keys, 0.0, layer.pool, CHANNELS // HEADS
    for group in range(GROUPS):
        usable = torch.ones(REFERENCES * POSITIONS, dtype=torch.bool)
        if keep is not None:
            usable = keep["a"][group].flatten()
        shown = given.view(GROUPS, -1)[group]
        for row in (2 * group, 2 * group + 1):
            for position in range(POSITIONS):
                top, left = (edge // pool * pool for edge in divmod(position, WIDTH))
                block = h[row, :, top : top + pool, left : left + pool].mean((1, 2))
                query = layer.to_q(layer.norm_query(block))
                weights = torch.zeros(1 + len(usable), dtype=torch.float64)
                for head in range(HEADS):
                    part = slice(dim * head, dim * (head + 1))
                    logits = keys[group][:, part] @ query[part] / dim**0.5
                    logits[1:][~usable] = -math.inf
                    weights += logits.softmax(0) / HEADS
                wanted = int(target[row].flatten()[position])
                if wanted == 0 or not bool((usable & (shown == wanted)).any()):
                    share = weights[0]
                else:
                    share = weights[1:][shown == wanted].sum()
                total -= math.log(float(share) + 1e-3)
    return total / (GROUPS * 2 * POSITIONS)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_cross_entropy_of_the_parts_shares(masked, pool):
    keep = None
    if masked:
        keep = {"a": rand(GROUPS, REFERENCES, POSITIONS, seed=9) > 0}
    layer, bank, h = example(keep, pool)
    target, given = labels(2 * GROUPS, 1), labels(GROUPS * REFERENCES, 2)
    given[:2][given[:2] == 2] = 1  # the first bank does not show part 2
    ours = float(loss(layer, bank, h, target, given).detach())
    assert ours == pytest.approx(plain(layer, bank, h, target, given, keep), abs=1e-9)


def test_training_on_it_finds_the_parts():
    """Features that name their part: within a few steps attention goes where they agree."""
    target, given = labels(2 * GROUPS, 1), labels(GROUPS * REFERENCES, 2)
    codes = rand(PARTS, CHANNELS, seed=5)
    h = codes[target.long()].movedim(-1, 1).contiguous()
    layer = RetrievalSite(CHANNELS, HEADS).double()
    layer.initialise(torch.Generator().manual_seed(0))
    features = codes[given.long()].view(GROUPS, REFERENCES, 1, POSITIONS, CHANNELS)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)

    def now():
        return loss(layer, bank_of(layer, features), h, target, given)

    before = float(now().detach())
    for _ in range(60):
        optimizer.zero_grad()
        now().backward()
        optimizer.step()
    assert before > 1.0 and float(now().detach()) < 0.3 * before


def test_positions_are_drawn_from_the_generator_alone(monkeypatch):
    monkeypatch.setattr(c, "QUERIES", 5)
    layer, bank, h = example()
    target, given = labels(2 * GROUPS, 1), labels(GROUPS * REFERENCES, 2)
    first = loss(layer, bank, h, target, given, seed=1)
    torch.manual_seed(77)
    assert torch.equal(first, loss(layer, bank, h, target, given, seed=1))
    assert not torch.equal(first, loss(layer, bank, h, target, given, seed=2))


def figure(seed=0):
    rng = np.random.default_rng(seed)
    return Figure(random_identity(rng), random_outfit(rng), random_scene(rng))


def test_parts_are_where_the_figure_is_drawn_in_their_colour():
    for seed in range(8):
        drawn = draw.render(figure(seed))
        assert drawn.parts.dtype == np.uint8 and drawn.parts.shape == drawn.mask.shape
        assert set(np.unique(drawn.parts)) == set(range(draw.PARTS))
        assert drawn.mask[drawn.parts > 0].mean() > 0.99
        hair = drawn.image[drawn.parts == draw.HAIR].astype(int)
        colour = np.array(HAIR_COLOURS[drawn.figure.identity.hair_colour])
        assert np.median(np.abs(hair - colour).max(1)) <= 2


def test_a_change_of_one_part_changes_no_pixel_of_another():
    first = figure(3)
    other = next(name for name in HAIR_COLOURS if name != first.identity.hair_colour)
    second = replace(first, identity=replace(first.identity, hair_colour=other))
    a, b = draw.render(first), draw.render(second)
    assert (a.parts == b.parts).all()
    changed = (a.image != b.image).any(-1)
    assert changed[a.parts == draw.HAIR].mean() > 0.99
    # Edges are averaged over 3x3 finer pixels, so that a neighbour's colour may reach a pixel.
    inner = np.zeros_like(changed)
    for y, x in np.argwhere(a.parts != draw.HAIR):
        around = a.parts[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        inner[y, x] = not (around == draw.HAIR).any()
    assert not changed[inner].any()


def test_parts_are_placed_as_the_picture_is():
    image = np.zeros((8, 8, 3), np.uint8)
    parts = np.zeros((8, 8), np.uint8)
    image[1:7, 2:4], parts[1:7, 2:4] = 200, 3
    sample = Sample(image, None, (0, 0, 8, 3), [], parts)
    taken = cut_reference(sample, "figure", 8, view=View(flip=True))
    assert (taken.parts == parts[:, ::-1]).all()
    below = cut_reference(sample, "clothes", 8, fill=(9, 9, 9))
    shown = below.image[..., 0] == 200
    assert shown.any() and (below.parts[shown] == 3).all()
    assert not below.parts[(below.image == 9).all(-1)].any()
    low = cut_reference(Sample(image, None, (0, 4, 8, 8), [], parts), "clothes", 8)
    assert (low.parts[:4] == parts[:4]).all() and not low.parts[4:].any()
    assert cut_reference(Sample(image), "figure", 8).parts is None


def test_parts_of_another_shape_or_type_are_refused():
    image = np.zeros((4, 5, 3), np.uint8)
    for parts in (np.zeros((5, 4), np.uint8), np.zeros((4, 5), np.int64)):
        message = sentence(lambda parts=parts: Sample(image, parts=parts))
        assert "parts" in message and str(parts.dtype) in message


def test_a_reference_only_gives_what_its_concept_asks_for():
    batches = RetrievalBatches(render_characters(5, 4), 4, 1, 0.5)
    seen = set()
    for step in range(6):
        batch = batches.batch(step)
        concepts = [ids.tolist() for ids in batch.reference_ids]
        for ids, parts in zip(concepts, batch.reference_parts):
            concept = _concept(ids)
            seen.add(concept)
            assert set(np.unique(parts)) - {0} <= set(PARTS_OF[concept])
        assert batch.target_parts.shape == (16, 64, 64)
    assert seen == set(PARTS_OF)


def _concept(ids):
    from retrieval_core.paperdoll.text import Tokenizer

    return next(name for name in PARTS_OF if list(Tokenizer()(name)) == ids)
