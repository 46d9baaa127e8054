"""Regions kept apart: whose a place is, what it may look at, and when."""

from __future__ import annotations

import pytest
import torch
from refusal import sentence

from retrieval_core.bank.site_bank import Bank
from retrieval_core.network.controlnet import Card, RetrievalControlNet
from retrieval_core.network.unet import UNet, UNetConfig, attention
from retrieval_core.sampling.applications import Retrieval, Several
from retrieval_core.sampling.controls import Controls
from retrieval_core.sampling.isolation import (
    SHARED,
    attend_apart,
    isolation_hook,
    owners,
    partition,
)
from retrieval_core.sampling.noise_schedule import NoiseSchedule
from retrieval_core.sampling.sampler import guided_denoiser

CONFIG = UNetConfig(32, (1, 2), (1, 1), (1, 1), 1, 16, num_heads=4)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def box(x0, x1, edge=8, value=1.0):
    region = torch.zeros(edge, edge)
    region[:, x0:x1] = value
    return region


def randomised(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.double().eval().requires_grad_(False)


# Whose a place is


def test_a_place_belongs_to_the_stronger_region_that_fills_most_of_it():
    regions = [box(0, 5), box(3, 8, value=0.8), box(3, 4, value=1.0)]
    found = owners(regions, (8, 8)).view(8, 8)
    # 3: two are equally strong; 4: the first beats 0.8.
    assert found[0].tolist() == [0, 0, 0, SHARED, 0, 1, 1, 1]
    assert (found == found[0]).all()


def test_half_filled_places_and_those_outside_belong_to_none():
    found = owners([box(0, 3), box(5, 8)], (4, 4)).view(4, 4)
    assert found[0, 0] == 0 and found[0, 3] == 1
    assert owners([box(0, 3, value=0.5), box(5, 8)], (8, 8))[0] == SHARED
    assert (owners([box(0, 3), box(5, 8)], (8, 8)).view(8, 8)[:, 3:5] == SHARED).all()


@pytest.mark.parametrize(
    "regions", [[], [box(0, 4)], [box(0, 4), box(0, 4)], [box(0, 4), box(4, 8, value=0.4)]]
)
def test_fewer_than_two_regions_with_places_leave_attention_alone(regions):
    assert partition(regions, (8, 8)) is None


# What it looks at


def test_attention_apart_is_attention_under_a_mask():
    regions, size = [box(0, 3), box(5, 8)], (8, 8)
    q, k, v = (rand(2, 64, 8, seed=i) for i in range(3))
    parts = partition(regions, size)
    found = attend_apart(lambda q, k, v, _: attention(q, k, v, 2), q, k, v, parts)
    owner = owners(regions, size)
    blocked = (owner[:, None] != owner) & (owner[:, None] != SHARED) & (owner != SHARED)
    mask = torch.zeros(64, 64, dtype=torch.float64).masked_fill(blocked, float("-inf"))
    torch.testing.assert_close(found, attention(q, k, v, 2, mask=mask))
    assert blocked.any() and not blocked.all()


def test_halves_kept_apart_look_at_half_of_the_pairs():
    pairs = []

    def attend(q, k, v, places):
        pairs.append(q.shape[1] * k.shape[1])
        return q

    x = rand(1, 64, 8)
    attend_apart(attend, x, x, x, partition([box(0, 4), box(4, 8)], (8, 8)))
    assert sum(pairs) == 64 * 64 // 2


def test_a_region_does_not_see_the_other_ones_tokens():
    hook = isolation_hook([box(0, 4), box(4, 8)])
    layer = UNet(CONFIG).middle_block[1].transformer_blocks[0].attn1
    q, k, v = (rand(1, 64, 8, seed=i) for i in range(3))
    left = box(0, 4).flatten() == 1
    before = hook(layer, (8, 8), q, k, v, 2)
    changed = torch.where(left[None, :, None], v, rand(1, 64, 8, seed=9))
    after = hook(layer, (8, 8), q, k, changed, 2)
    assert torch.equal(before[:, left], after[:, left])
    assert not torch.equal(before[:, ~left], after[:, ~left])


# When


@pytest.fixture(scope="module")
def network():
    return randomised(RetrievalControlNet(CONFIG, Card("paperdoll")), 1)


def two(network, apart, strengths=(1.0, 1.0)):
    applied = []
    for i, (region, strength) in enumerate(zip((box(0, 4), box(4, 8)), strengths)):
        bank = network.bank(network.encode(rand(1, 4, 8, 8, seed=i), rand(1, 3, 16)))
        applied.append(Retrieval(network.retrieval, bank, strength, region=region, apart=apart[i]))
    return Several(applied)


@pytest.mark.parametrize(
    ("apart", "strengths", "acts"),
    [
        ((0.5, 0.5), (1.0, 1.0), [True, True, False]),
        ((0.5, 1.0), (1.0, 1.0), [True, True, False]),
        ((1.0, 1.0), (1.0, 1.0), [True, True, True]),
        ((0.0, 1.0), (1.0, 1.0), [False] * 3),
        ((0.0, 0.0), (1.0, 1.0), [False] * 3),
        ((1.0, 1.0), (1.0, 0.0), [False] * 3),
    ],
)
def test_both_must_want_it_and_act(network, apart, strengths, acts):
    several = two(network, apart, strengths)
    found = [several.arguments([0], progress)["self_attention"] for progress in (0.0, 0.5, 0.6)]
    assert [hook is not None for hook in found] == acts
    assert several.arguments([0], 0.0)["skip_hook"] is not None


def test_no_bank_is_not_kept_apart(network):
    left, right = two(network, (1.0, 1.0)).applied
    empty = Retrieval(network.retrieval, Bank(), region=right.region, apart=1.0)
    assert Several([left, empty]).arguments([0], 0.0)["self_attention"] is None


def test_a_denoising_step_keeps_them_apart(network):
    unet, schedule = randomised(UNet(CONFIG), 2), NoiseSchedule()
    x, cond, uncond = rand(2, 4, 8, 8), rand(2, 3, 16, seed=1), rand(2, 3, 16, seed=2)

    def found(apart):
        several = two(network, (apart, apart))
        return guided_denoiser(unet, schedule, cond, uncond, 2.0, several)(x, 900)

    together, kept = found(0.0), found(1.0)
    assert not torch.allclose(together, kept)
    assert torch.equal(found(0.05), together)  # timestep 900 lies after 5 % of sampling
    hook = isolation_hook([box(0, 4), box(4, 8)])
    original = UNet.forward

    def isolated(*arguments, **named):
        return original(unet, *arguments, **{**named, "self_attention": hook})

    by_hand = guided_denoiser(isolated, schedule, cond, uncond, 2.0, two(network, (0.0, 0.0)))
    assert torch.equal(by_hand(x, 900), kept)


@pytest.mark.parametrize("apart", [-0.1, 1.1, float("nan")])
def test_a_part_of_sampling_outside_0_to_1_is_refused(apart):
    assert f"{apart:g}" in sentence(Controls, apart=apart)
    assert f"{apart:g}" in sentence(Retrieval, {}, Bank(), apart=apart)
