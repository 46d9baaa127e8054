"""Regions kept apart: whose a position is, what it may attend to, and when."""

from __future__ import annotations

import pytest
import torch
from refusal import sentence

from retrieval_core.bank.encoding import encode_references
from retrieval_core.bank.site_bank import Bank, make_network_bank
from retrieval_core.bank.tokens import join_references
from retrieval_core.network.controlnet import Card, RetrievalControlNet
from retrieval_core.network.unet import UNet, UNetConfig, attention
from retrieval_core.sampling.applications import Applications, Retrieval
from retrieval_core.sampling.controls import Controls
from retrieval_core.sampling.frozen_site import freeze_sites
from retrieval_core.sampling.isolation import SHARED, assign_owners, attend_apart, partition
from retrieval_core.sampling.joint_attention import Source
from retrieval_core.sampling.noise_schedule import NoiseSchedule
from retrieval_core.sampling.sampler import make_guided_denoiser

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


def plain_mask(regions, size):
    """[N, N]: -inf where a position of one region would attend to one of another."""
    owner = assign_owners(regions, size)
    blocked = (owner[:, None] != owner) & (owner[:, None] != SHARED) & (owner != SHARED)
    assert blocked.any() and not blocked.all()
    return torch.zeros(blocked.shape, dtype=torch.float64).masked_fill(blocked, float("-inf"))


# Whose a position is


def test_a_position_belongs_to_the_stronger_region_that_fills_most_of_it():
    regions = [box(0, 5), box(3, 8, value=0.8), box(3, 4, value=1.0)]
    found = assign_owners(regions, (8, 8)).view(8, 8)
    # 3: two are equally strong; 4: the first beats 0.8.
    assert found[0].tolist() == [0, 0, 0, SHARED, 0, 1, 1, 1]
    assert (found == found[0]).all()


def test_half_filled_positions_and_those_outside_belong_to_none():
    found = assign_owners([box(0, 3), box(5, 8)], (4, 4)).view(4, 4)
    assert found[0, 0] == 0 and found[0, 3] == 1
    assert assign_owners([box(0, 3, value=0.5), box(5, 8)], (8, 8))[0] == SHARED
    assert (assign_owners([box(0, 3), box(5, 8)], (8, 8)).view(8, 8)[:, 3:5] == SHARED).all()


@pytest.mark.parametrize(
    "regions", [[], [box(0, 4)], [box(0, 4), box(0, 4)], [box(0, 4), box(4, 8, value=0.4)]]
)
def test_fewer_than_two_regions_with_positions_leave_attention_alone(regions):
    assert partition(regions, (8, 8)) is None


# What it attends to


@pytest.mark.parametrize("order", [[0, 0], [0, 1, None]])
def test_attention_apart_is_attention_under_a_mask(order):
    """Chunks of the batch are kept apart by the same regions, by others, or not at all."""
    regions, size = ([box(0, 3), box(5, 8)], [box(0, 2), box(2, 6)]), (8, 8)
    q, k, v = (rand(2 * len(order), 64, 8, seed=i) for i in range(3))
    partitions = [*(partition(two, size) for two in regions), None]
    masks = [*(plain_mask(two, size) for two in regions), None]
    chosen = [-1 if i is None else i for i in order]
    parts = [partitions[i] for i in chosen]
    found = attend_apart(attention, q, k, v, 2, [[]] * len(order), parts)
    rows = zip(*(t.split(2) for t in (q, k, v)), chosen, strict=True)
    expected = [attention(*qkv, 2, mask=masks[i]) for *qkv, i in rows]
    torch.testing.assert_close(found, torch.cat(expected))


def test_a_bank_is_attended_to_beside_the_own_part_only_within_its_region():
    regions, size = [box(0, 4), box(4, 8)], (8, 8)
    q, k, v = (rand(2, 64, 8, seed=i) for i in range(3))
    keys, values = rand(1, 5, 8, seed=4), rand(1, 5, 8, seed=5)
    soft = torch.linspace(0, 1, 64, dtype=torch.float64)
    chunks = [[Source(keys, values, None, soft)], []]
    found = attend_apart(attention, q, k, v, 2, chunks, [partition(regions, size)] * 2)
    mask = plain_mask(regions, size)
    own = attention(q, k, v, 2, mask=mask)
    both = [torch.cat([t[:1], bank], 1) for t, bank in ((k, keys), (v, values))]
    joint = attention(q[:1], *both, 2, mask=torch.nn.functional.pad(mask, (0, 5)))
    torch.testing.assert_close(found[:1], own[:1] + soft[:, None] * (joint - own[:1]))
    torch.testing.assert_close(found[1:], own[1:])


def test_halves_kept_apart_look_at_half_of_the_pairs():
    pairs = []

    def attend(q, k, v, heads):
        pairs.append(q.shape[1] * k.shape[1])
        return q

    x = rand(1, 64, 8)
    attend_apart(attend, x, x, x, 2, [[]], [partition([box(0, 4), box(4, 8)], (8, 8))])
    assert sum(pairs) == 64 * 64 // 2


# When


@pytest.fixture(scope="module")
def network():
    return randomised(RetrievalControlNet(CONFIG, Card("paperdoll")), 1)


@pytest.fixture(scope="module")
def banks(network):
    encoded = encode_references(network, rand(2, 4, 8, 8), rand(2, 3, 16))
    return [make_network_bank(network, join_references([one])) for one in encoded]


def two(network, banks, apart, strengths=(1.0, 1.0), start=0.0):
    """Two applications, of the left and the right half."""
    regions, sites = (box(0, 4), box(4, 8)), freeze_sites(network)
    each = zip(banks, strengths, regions, apart, strict=True)
    return [
        Retrieval(bank, strength, start, region=region, apart=until, sites=sites)
        for bank, strength, region, until in each
    ]


def self_attention(applications, progress, value):
    """What the self-attention of one layer gives at a point of sampling."""
    layer = UNet(CONFIG).middle_block[1].transformer_blocks[0].attn1
    hook = applications.hooks([0], progress).get("self_attention")
    q, k, _ = (rand(1, 64, 8, seed=i) for i in range(3))
    return layer.attend(q, k, value, 2) if hook is None else hook(layer, (8, 8), q, k, value, 2)


def test_a_region_does_not_see_the_other_ones_tokens(network, banks):
    applications = Applications(two(network, banks, (1.0, 1.0)))
    left = box(0, 4).flatten() == 1
    value = rand(1, 64, 8, seed=2)
    changed = torch.where(left[None, :, None], value, rand(1, 64, 8, seed=9))
    before, after = (self_attention(applications, 0.0, each) for each in (value, changed))
    assert torch.equal(before[:, left], after[:, left])
    assert not torch.equal(before[:, ~left], after[:, ~left])


@pytest.mark.parametrize(
    ("apart", "strengths", "start", "acts"),
    [
        ((0.5, 0.5), (1.0, 1.0), 0.0, [True, True, False]),
        ((0.5, 1.0), (1.0, 1.0), 0.0, [True, True, False]),
        ((1.0, 1.0), (1.0, 1.0), 0.0, [True, True, True]),
        ((1.0, 1.0), (1.0, 1.0), 0.55, [True, True, True]),  # before either retrieves
        ((0.0, 1.0), (1.0, 1.0), 0.0, [False] * 3),
        ((0.0, 0.0), (1.0, 1.0), 0.0, [False] * 3),
        ((1.0, 1.0), (1.0, 0.0), 0.0, [False] * 3),
    ],
)
def test_both_must_want_it_and_have_a_strength(network, banks, apart, strengths, start, acts):
    applications = Applications(two(network, banks, apart, strengths, start))
    value, h = rand(1, 64, 8, seed=2), rand(1, 32, 8, 8)
    plain = self_attention(Applications([]), 0.0, value)
    found = [self_attention(applications, progress, value) for progress in (0.0, 0.5, 0.6)]
    assert [not torch.equal(one, plain) for one in found] == acts
    hooks = [applications.hooks([0], progress)["skip_hook"] for progress in (0.0, 0.6)]
    assert [not torch.equal(hook("input_0", h), h) for hook in hooks] == [start == 0, True]


def test_no_bank_is_not_kept_apart(network, banks):
    applications = Applications(two(network, [banks[0], Bank()], (1.0, 1.0)))
    value = rand(1, 64, 8, seed=2)
    plain = self_attention(Applications([]), 0.0, value)
    assert torch.equal(self_attention(applications, 0.0, value), plain)


def test_a_denoising_step_keeps_them_apart(network, banks):
    unet, schedule = randomised(UNet(CONFIG), 2), NoiseSchedule()
    x, cond, uncond = rand(2, 4, 8, 8), rand(2, 3, 16, seed=1), rand(2, 3, 16, seed=2)

    def found(apart, model=unet):
        applications = two(network, banks, (apart, apart))
        return make_guided_denoiser(model, schedule, cond, uncond, 2.0, applications)(x, 900)

    together, kept = found(0.0), found(1.0)
    assert (together - kept).abs().max() > 1e-3
    assert torch.equal(found(0.05), together)  # timestep 900 lies after 5 % of sampling

    def masked(layer, size, q, k, v, heads):
        return attention(q, k, v, heads, mask=plain_mask([box(0, 4), box(4, 8)], size))

    def isolated(*arguments, skip_hook, **_):
        return unet(*arguments, skip_hook=skip_hook, self_attention=masked)

    torch.testing.assert_close(found(0.0, isolated), kept)


@pytest.mark.parametrize("apart", [-0.1, 1.1, float("nan")])
def test_a_part_of_sampling_outside_0_to_1_is_refused(apart):
    assert f"{apart:g}" in sentence(Controls, apart=apart)
