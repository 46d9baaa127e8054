"""Strength curves, groups of sites and soft regions against plain formulations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from refusal import sentence

from retrieval_core.bank.site_bank import make_network_bank
from retrieval_core.bank.tokens import EncodedReference, join_references
from retrieval_core.network.controlnet import Card, RetrievalControlNet
from retrieval_core.network.unet import SD15, SDXL, UNetConfig
from retrieval_core.sampling.applications import Applications, Retrieval
from retrieval_core.sampling.controls import (
    CURVES,
    GROUP_PRESETS,
    Controls,
    group_sites,
    parse_curve,
)
from retrieval_core.sampling.frozen_site import freeze_sites
from retrieval_core.sampling.regions import soften

FLAT = UNetConfig(32, (1,), (1,), (1,), 1, 16, num_head_channels=16)


@pytest.mark.parametrize(
    ("text", "position", "factor"),
    [
        ("1, 0.5, 0", 0.0, 1.0),
        ("1, 0.5, 0", 0.25, 0.75),
        ("1, 0.5, 0", 0.5, 0.5),
        ("1, 0.5, 0", 1.0, 0.0),
        ("0,2", 0.3, 0.6),
        (" .7 ", 0.9, 0.7),
        ("1e-1,-1", 1.0, -1.0),
        ("constant", 0.4, 1.0),
        ("Ease In", 0.0, 0.0),
        ("ease in", 0.25, 3 * 0.25**2 - 2 * 0.25**3),
        ("ease in", 1.0, 1.0),
        ("ease out", 0.25, 1 - (3 * 0.25**2 - 2 * 0.25**3)),
        ("ease in and out", 0.5, 1.0),
        ("ease in and out", 0.75, 0.5),
    ],
)
def test_curves(text, position, factor):
    assert parse_curve(text).at(position) == pytest.approx(factor)


@pytest.mark.parametrize("text", ["1, two", "", "1,,2", "nan", "1, inf", "ease", "[1, 2]", "1;2"])
def test_a_curve_of_other_than_numbers_is_refused_in_one_sentence(text):
    assert repr(text) in sentence(parse_curve, text)


@pytest.fixture(scope="module")
def network():
    """A trainable network with every weight noise, in float64."""
    generator = torch.Generator().manual_seed(0)
    made = RetrievalControlNet(FLAT, Card("paperdoll")).double()
    for parameter in made.retrieval.parameters():
        with torch.no_grad():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def retrieval(network):
    generator = torch.Generator().manual_seed(1)
    tokens = {
        site: torch.randn(1, 12, width, generator=generator, dtype=torch.float64)
        for site, width in FLAT.site_channels().items()
    }
    references = [EncodedReference(tokens), EncodedReference(tokens, 0.3)]
    with torch.no_grad():
        bank = make_network_bank(network, join_references(references))
    return Retrieval(bank, sites=freeze_sites(network))


def features(rows):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, 32, 4, 4, generator=generator, dtype=torch.float64)


def retrieved(network, retrieval, site, h):
    """zero_conv(r) by the layers of the network."""
    bank = retrieval.bank.sites[site]
    return network.retrieval[site](h, bank.keys, bank.values, bank.bias)


def test_the_curve_lies_over_the_active_part_of_sampling(retrieval):
    one = replace(retrieval, strength=2.0, start=0.2, end=0.6, curve=parse_curve("0, 1"))
    found = [one.strength_at(p) for p in (0.1, 0.2, 0.3, 0.4, 0.6, 0.7)]
    assert found == pytest.approx([0.0, 0.0, 0.5, 1.0, 2.0, 0.0])
    assert Applications([one]).hooks([0], 0.2) == {}  # exactly 0: the base model, bit for bit
    assert replace(one, start=0.5, end=0.5).strength_at(0.5) == 0.0  # its first number


def test_a_step_adds_strength_times_curve_times_group_times_region(network, retrieval):
    h = features(2)
    region = torch.rand(4, 4, generator=torch.Generator().manual_seed(2))
    set_up = replace(
        retrieval,
        strength=1.5,
        region=region,
        curve=parse_curve("0.5, 1"),
        site_strength={"input_0": 0.25},
        guidance="both",
    )
    hook = Applications([set_up]).hooks([0, 1], 0.5)["skip_hook"]
    for site, group in (("input_0", 0.25), ("middle", 1.0)):
        plain = retrieved(network, retrieval, site, h)
        expected = h + 1.5 * 0.75 * group * region * plain
        torch.testing.assert_close(hook(site, h), expected, rtol=1e-6, atol=1e-6)
    off = Applications([replace(set_up, site_strength={"input_0": 0.0})])
    assert off.hooks([0, 1], 0.5)["skip_hook"]("input_0", h) is h


@pytest.mark.parametrize("region", [None, torch.linspace(0, 1, 16).view(4, 4)])
def test_frozen_sites_retrieve_what_the_layers_do(network, retrieval, region):
    one, h = replace(retrieval, region=region), features(3)
    assert list(one.sites) == list(FLAT.site_channels())
    for site, frozen in one.sites.items():
        found = one.add_retrieved(site, h, [0], 0.7)
        weight = 0.7 if region is None else 0.7 * region
        plain = retrieved(network, retrieval, site, h)
        torch.testing.assert_close(found, h + weight * plain, rtol=1e-6, atol=1e-6)
        assert plain.requires_grad and not found.requires_grad
        bank, sites = (t.to("cpu", torch.bfloat16) for t in (one.bank, frozen))
        half = replace(one, bank=bank, sites={site: sites})
        near = half.add_retrieved(site, h.bfloat16(), [0], 0.7)
        torch.testing.assert_close(near.double(), found, rtol=0.05, atol=0.05)


def test_freezing_reads_weights_as_the_host_keeps_them(network, retrieval):
    """A host's own way to read a layer's weights is all that freezing uses."""
    with torch.device("meta"):
        hollow = RetrievalControlNet(FLAT, Card("paperdoll"))
    held = dict(zip(hollow.modules(), network.modules(), strict=True))
    found = freeze_sites(hollow, lambda layer: (held[layer].weight.detach(), held[layer].bias))
    h = features(1)
    for site in retrieval.sites:
        expected = retrieval.add_retrieved(site, h, [0], 1.0)
        one = replace(retrieval, sites=found)
        assert torch.equal(one.add_retrieved(site, h, [0], 1.0), expected)


def test_groups_are_deep_between_and_shallow():
    groups = group_sites(SD15)
    assert groups["middle"] == groups["input_11"] == groups["input_9"] == "composition"
    assert [groups[f"input_{i}"] for i in (0, 1, 2)] == ["detail"] * 3
    assert {groups[f"input_{i}"] for i in range(3, 9)} == {"middle"}
    assert set(group_sites(SDXL).values()) == {"composition", "middle", "detail"}
    assert group_sites(FLAT) == {"input_0": "detail", "input_1": "detail", "middle": "composition"}


def test_presets_and_custom_factors_reach_the_sites():
    for name, factors in GROUP_PRESETS.items():
        strengths = Controls(groups=factors).site_strengths(group_sites(SD15))
        found = (strengths["middle"], strengths["input_5"], strengths["input_0"])
        assert found == factors, name
    custom = Controls(groups=(0.2, 0.0, 3.0)).site_strengths(group_sites(SD15))
    assert (custom["input_10"], custom["input_4"], custom["input_2"]) == (0.2, 0.0, 3.0)


def test_a_group_without_sites_is_refused_in_one_sentence():
    middle = Controls(groups=GROUP_PRESETS["middle only"])
    assert "composition, detail" in sentence(middle.site_strengths, group_sites(FLAT))
    assert "'middle'" in sentence(middle.site_strengths, group_sites(FLAT))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"groups": (1.0, math.nan, 1.0)}, "nan"),
        ({"region_blur": -1.0}, "blur is -1"),
        ({"region_blur": math.nan}, "blur is nan"),
        ({"region_blur": math.inf}, "blur is inf"),
        ({"token_budget": 0}, "budget is 0"),
        ({"token_budget": -3}, "budget is -3"),
    ],
)
def test_bad_controls_are_refused_in_one_sentence(bad, words):
    assert words in sentence(Controls, **bad)


def test_soft_edges_are_a_gaussian_of_the_region():
    region = torch.zeros(9, 15)
    region[:, 6:] = 1
    found = soften(region, 1.5).double()
    for x in range(15):
        reach = range(-5, 6)
        bell = [math.exp(-0.5 * (d / 1.5) ** 2) for d in reach]
        seen = [float(min(max(x + d, 0), 14) >= 6) for d in reach]
        expected = sum(b * s for b, s in zip(bell, seen, strict=True)) / sum(bell)
        torch.testing.assert_close(
            found[:, x], torch.full((9,), expected).double(), atol=1e-6, rtol=0
        )
    assert soften(region, 0) is region
    assert soften(torch.ones(3, 4), 50).allclose(torch.ones(3, 4))
    assert soften(region.T, 1.5).allclose(found.float().T)


def test_every_named_curve_starts_or_ends_at_full_strength_somewhere():
    assert all(max(curve.factors) == 1.0 for curve in CURVES.values())
