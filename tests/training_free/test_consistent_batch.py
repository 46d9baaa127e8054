"""Pictures of a batch that share their subject: the formula in float64, and what must hold."""

from __future__ import annotations

import math

import pytest
import torch
from refusal import sentence
from torch.utils.flop_counter import FlopCounterMode

from retrieval_core.network.unet import SD15, SDXL, UNet, UNetConfig
from retrieval_core.training_free import consistent_batch
from retrieval_core.training_free.consistent_batch import (
    SHARPNESS,
    ConsistentBatch,
    choose_grid,
    cluster_subjects,
    list_shared_blocks,
    share_subjects,
)

CONFIG = UNetConfig(32, (1, 2), (1, 1), (1, 1), 1, 16, num_head_channels=16)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_share(x, subjects, strength, seen):
    """The formula, one position at a time; seen: row -> the rows that it looks at."""
    shown = {j for row in seen for j in row}
    rows, channels, height, width = x.shape
    tokens = [[x[i, :, y, z] for y in range(height) for z in range(width)] for i in range(rows)]
    total = sum(float(subjects[j].sum()) for j in shown)
    mean = sum(float(subjects[j, p]) * t for j in shown for p, t in enumerate(tokens[j])) / total

    def direction(i, p):
        centred = tokens[i][p] - mean
        return centred / centred.norm()

    out = x.clone()
    for i in range(rows):
        for p in range(height * width):
            weights, found = 0.0, torch.zeros(channels, dtype=torch.float64)
            for j in seen[i]:
                for q in range(height * width):
                    if subjects[j, q] < 0.5:
                        continue
                    weight = math.exp(SHARPNESS * float(direction(i, p) @ direction(j, q)))
                    weights, found = weights + weight, found + weight * tokens[j][q]
            if seen[i]:
                share = strength * float(subjects[i, p])
                moved = tokens[i][p] + share * (found / weights - tokens[i][p])
                out[i, :, p // width, p % width] = moved
    return out


@pytest.mark.parametrize(
    ("anchors", "seen"),
    [
        (0, [[1, 2], [0, 2], [0, 1]]),
        (1, [[], [0], [0]]),
        (2, [[1], [0], [0, 1]]),
        (9, [[1, 2], [0, 2], [0, 1]]),
    ],
)
@pytest.mark.parametrize("logits", [1 << 24, 20])
def test_sharing_is_the_formula(anchors, seen, logits, monkeypatch):
    monkeypatch.setattr(consistent_batch, "_MOST_LOGITS", logits)
    x = rand(3, 6, 3, 4)
    found = ConsistentBatch(0.7, anchors=anchors).share(x)
    expected = plain_share(x, cluster_subjects(x), 0.7, seen)
    # Subjects and logits are float32 by design.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - x)[1].abs().max() > 1e-2


def test_a_batch_of_one_and_the_only_anchor_are_untouched():
    x, more = rand(1, 6, 4, 4).float(), rand(2, 6, 4, 4, seed=1).float()
    assert ConsistentBatch().share(x) is x
    followed = ConsistentBatch(anchors=1).share(torch.cat([x, more]))
    assert torch.equal(followed[:1], x)
    assert not torch.equal(followed[1:], more)


def test_further_pictures_change_nothing_about_the_anchors():
    x, batch = rand(4, 6, 4, 4), ConsistentBatch(anchors=2)
    torch.testing.assert_close(batch.share(x)[:2], batch.share(x[:2]), rtol=0, atol=1e-12)


def test_the_order_of_pictures_does_not_matter():
    x = rand(4, 6, 4, 4)
    order = [2, 0, 3, 1]
    batch = ConsistentBatch()
    torch.testing.assert_close(batch.share(x[order]), batch.share(x)[order], rtol=1e-5, atol=1e-6)


def draw_features(figure, seed, background=0):
    """Features [1, 16, 12, 12] of a figure [12, 12] before a background, with some noise."""
    on, off = rand(16, 1, 1, seed=seed), rand(16, 1, 1, seed=100 + background)
    return (torch.where(figure.bool(), on, off) + 0.3 * rand(16, 12, 12, seed=seed + 1))[None]


@pytest.mark.parametrize("bottom", [9, 12])
def test_subjects_are_found_also_where_the_lower_border_cuts_them_off(bottom):
    figure = torch.zeros(12, 12)
    figure[2:bottom, 4:9] = 1
    found = cluster_subjects(draw_features(figure, 3)).view(12, 12)
    assert torch.equal(found > 0.5, figure.bool())


def test_no_background_arrives_and_the_own_one_stays():
    figures = torch.zeros(2, 12, 12)
    figures[0, 2:10, 4:9] = 1
    figures[1, 3:11, 3:8] = 1
    first = draw_features(figures[0], 3, 1)
    shared = [
        ConsistentBatch().share(torch.cat([first, draw_features(figures[1], 13, background)]))[0]
        for background in (2, 3)
    ]
    outside = figures[0] == 0
    torch.testing.assert_close(shared[0][:, outside], first[0][:, outside], rtol=0, atol=0.02)
    moved = (shared[0] - first[0])[:, ~outside].abs().mean()
    assert (shared[0] - shared[1]).abs().max() < 0.1 * moved


@pytest.mark.parametrize(("size", "pictures"), [((16, 16), 3), ((64, 64), 3), ((90, 128), 15)])
def test_a_picture_looks_at_no_more_positions_than_the_limit(size, pictures):
    grid = choose_grid(size, pictures)
    assert len(grid.unique()) == len(grid) and grid.max() < size[0] * size[1]
    assert len(grid) * pictures <= 1.1 * 2048
    if size[0] * size[1] * pictures <= 2048:
        assert len(grid) == size[0] * size[1]


@pytest.mark.parametrize("config", [CONFIG, SD15, SDXL])
def test_shared_blocks_are_above_the_coarsest_resolution(config):
    factors = list(config.site_downsampling().values())[:-1][::-1]  # of the decoder's blocks
    blocks = list_shared_blocks(config)
    assert blocks[-1] == len(factors) - 1
    assert all(factors[block] < max(factors) for block in blocks)
    assert sum(factor < max(factors) for factor in factors) == len(blocks) + 1


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet(CONFIG).eval().requires_grad_(False)


def run(unet, timestep=700, rows=4):
    x, context = rand(rows, 4, 8, 8, seed=7).float(), rand(rows, 3, 16, seed=8).float()
    return unet(x, torch.full((rows,), timestep), context)


def test_strength_zero_and_outside_the_schedule_are_bit_for_bit_the_base(unet):
    plain = run(unet)
    for nothing in (ConsistentBatch(0.0), ConsistentBatch(start=0.4), ConsistentBatch(end=0.2)):
        with share_subjects(unet, nothing, 1, 4):
            assert torch.equal(run(unet), plain)
    with share_subjects(unet, ConsistentBatch(), 1, 4):
        assert not torch.equal(run(unet), plain)
    assert torch.equal(run(unet), plain)


def test_batches_drawn_at_once_stay_apart_and_negative_prompts_are_untouched(unet):
    plain = run(unet, rows=6)
    with share_subjects(unet, ConsistentBatch(), 2, 2):
        shared = run(unet, rows=6)
    x, context = rand(6, 4, 8, 8, seed=7).float(), rand(6, 3, 16, seed=8).float()
    with share_subjects(unet, ConsistentBatch(), 1, 2):
        alone = unet(x[2:4], torch.full((2,), 700), context[2:4])
    torch.testing.assert_close(shared[2:4], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared[4:], plain[4:], rtol=1e-4, atol=1e-5)
    assert ((shared - plain)[:4].flatten(1).abs().amax(1) > 1e-3).all()


def count_operations(config, edge, rows):
    """Operations of a step of `rows` pictures with both prompts, and of sharing in it."""
    with torch.device("meta"):
        made = UNet(config)
        x, steps = torch.empty(2 * rows, 4, edge, edge), torch.empty(2 * rows)
        context = torch.empty(2 * rows, 77, config.context_dim)
        y = None if config.adm_in_channels is None else torch.empty(2 * rows, 2816)
    streams = []
    skips = list(config.site_channels().values())[-2::-1]
    for index in list_shared_blocks(config):
        made.output_blocks[index].register_forward_pre_hook(
            lambda block, given, skip=skips[index]: streams.append(given[0][:rows, :-skip])
        )
    with torch.inference_mode(), FlopCounterMode(display=False) as base:
        made(x, steps, context, y)
    with torch.inference_mode(), FlopCounterMode(display=False) as sharing:
        for stream in streams:
            ConsistentBatch().share(stream)
    return base.get_total_flops(), sharing.get_total_flops()


@pytest.mark.parametrize(("config", "edge"), [(SD15, 64), (SDXL, 128)])
@pytest.mark.parametrize("rows", [2, 4, 16])
def test_sharing_costs_less_than_a_tenth_of_a_step(config, edge, rows):
    base, sharing = count_operations(config, edge, rows)
    assert 0 < sharing < 0.1 * base


def test_bad_settings_are_refused_in_one_sentence():
    assert "strength of consistent pictures is 1.5" in sentence(ConsistentBatch, 1.5)
    assert "is nan" in sentence(ConsistentBatch, math.nan)
    assert "start at 0.6 and end at 0.5" in sentence(ConsistentBatch, 1.0, 0.6, 0.5)
    assert "-1 anchors" in sentence(ConsistentBatch, anchors=-1)
