"""The measurement of the controls: what it compares, and where each region acts."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from retrieval_core.bank.site_bank import make_network_bank
from retrieval_core.network.unet import SD15, SDXL
from retrieval_core.paperdoll import measure_controls as m
from retrieval_core.paperdoll.bundle import load_bundle
from retrieval_core.paperdoll.cases import make_character_case
from retrieval_core.paperdoll.generate import Sampling, apply_bank, draw_noise, encode_group
from retrieval_core.sampling.applications import Applications
from retrieval_core.sampling.regions import resize_region

QUICK = Sampling(steps=2)


@pytest.fixture(scope="module")
def bundle():
    return load_bundle()


def retrieval(bundle, index, **changes):
    tokens = encode_group(bundle.base, bundle.network, make_character_case(1, index).references)
    return apply_bank(bundle.network, tokens, Sampling(steps=2, **changes))


def test_applications_add_one_after_another_each_in_its_region(bundle):
    """Retrieval reads the features as they are then, so the second sees the first one's work."""
    left, everywhere = m._limit_to_half(retrieval(bundle, 0), 0), retrieval(bundle, 1)
    h = torch.randn(2, 64, 16, 32, generator=torch.Generator().manual_seed(0))
    site = copy.deepcopy(bundle.network.retrieval["input_0"]).double()
    x = h[:1].double()

    def added_to(features, one):
        bank = one.bank.sites["input_0"]
        r = one.strength * site(features, bank.keys.double(), bank.values.double())
        return r if one.region is None else r * resize_region(one.region, features)

    with torch.inference_mode():
        found = Applications([left, everywhere]).hooks([0, 1], 0.5)["skip_hook"]("input_0", h)
        expected = x + added_to(x, left)
        expected = expected + added_to(expected, everywhere)
        at_once = x + added_to(x, left) + added_to(x, everywhere)
        alone = Applications([left]).hooks([0, 1], 0.5)["skip_hook"]("input_0", h)
    torch.testing.assert_close(found[:1].double(), expected, rtol=1e-4, atol=1e-4)
    assert (expected - at_once).abs().max() > 0.01
    # The left one acts in its own half (its soft edge aside), and both on the conditional row.
    assert torch.equal(alone[..., 18:], h[..., 18:]) and not torch.equal(alone, h)
    assert torch.equal(found[1], h[1])


def test_applications_without_anything_to_do_leave_the_model_alone(bundle):
    off = retrieval(bundle, 0, strength=0.0)
    assert Applications([off, off]).hooks([0], 0.5) == {} == Applications([]).hooks([0], 0.5)
    assert Applications([off, retrieval(bundle, 1)]).hooks([0], 0.5)


def test_the_other_half_keeps_its_own_character(bundle, monkeypatch):
    """Changing the right one's references changes the right half; without regions, both alike."""
    cases = [make_character_case(1, i) for i in range(12)]
    lefts = cases[:4]
    noise = torch.cat([draw_noise(bundle.base, 1, i, width=2) for i in range(4)])

    def share_on_the_right():
        first, other = (
            m.generate_pairs(bundle, lefts, rights, noise, QUICK)
            for rights in (cases[4:8], cases[8:])
        )
        change = (first - other).abs().mean((0, 1, 2))
        assert change.shape == (128,)
        return float(change[72:].mean() / (change[72:].mean() + change[:56].mean()))

    assert share_on_the_right() > 0.67
    changed = [
        m.generate_pairs(bundle, lefts, r, noise, QUICK, by_area=True)
        for r in (cases[4:8], cases[8:])
    ]
    left, right = (changed[0] - changed[1]).split(64, -1)
    assert not left.any() and right.abs().mean() > 0.01
    monkeypatch.setattr(m, "_limit_to_half", lambda retrieval, half: retrieval)
    assert 0.4 < share_on_the_right() < 0.6


def test_every_line_is_measured_and_printed_as_one_json_object(monkeypatch, capsys):
    monkeypatch.setattr(m, "Sampling", lambda: QUICK)
    assert m.main(["--count", "2", "--seed", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"figures", "seed", *m.LINES}
    for lines, first, others in (
        (result["token budget"], "all tokens", 3),
        (result["query pooling"], "each position", 1),
    ):
        for task in m.TASKS:
            rates = dict(lines[task])
            lost, before = rates.pop("lost, points"), rates.pop(first)["mean"]
            assert len(lost) == others
            assert lost == {
                name: pytest.approx(before - rate["mean"], abs=0.01) for name, rate in rates.items()
            }
    assert result["masks"]["chance"] == 12.5
    assert set(result["regions"]) == {
        "chance",
        "two regions",
        "two regions, kept apart",
        "two regions, kept apart for half of sampling",
        "two regions, prompts by area",
        "without retrieval",
    }


def test_what_cannot_be_measured_is_one_sentence(capsys):
    assert m.main(["--count", "0"]) == 2 and "0 figures" in capsys.readouterr().err
    assert m.main(["--weights", "/nowhere"]) == 2 and "missing" in capsys.readouterr().err


def test_pooling_is_measured_on_a_copy(bundle, monkeypatch):
    seen = []

    read_figures = m.read_figures

    def read(measured, *rest):
        layers = measured.network.retrieval
        seen.append({site: layer.pool for site, layer in layers.items()})
        return read_figures(measured, *rest)

    monkeypatch.setattr(m, "read_figures", read)
    m.measure_pooling(bundle, 1, 3, QUICK)
    factors = bundle.network.config.site_downsampling()
    pooled = {site: 2 if factor == 1 else 1 for site, factor in factors.items()}
    assert seen == [dict.fromkeys(factors, 1), pooled] * 2
    assert {layer.pool for layer in bundle.network.retrieval.values()} == {1}


@pytest.mark.parametrize(
    ("config", "edge", "ratios"),
    [
        # Of four references' tokens by site, 4 * ceil(edge / factor) ** 2, the budget keeps as many
        # as one reference has at half resolution or coarser, and 512 at least.
        (SD15, 64, {1: 16384 / 1024, 2: 4096 / 1024, 4: 1024 / 512, 8: 1}),
        (SDXL, 128, {1: 65536 / 4096, 2: 16384 / 4096, 4: 4096 / 1024}),
        (SD15, 75, {1: 22500 / 1444, 2: 5776 / 1444, 4: 1444 / 512, 8: 1}),
    ],
)
def test_merging_ratios_are_tokens_of_four_references_by_automatic_budget(config, edge, ratios):
    assert m.compute_merging_ratios(config, edge) == pytest.approx(ratios)


def test_imitated_ratios_leave_paper_dolls_the_same_share_of_tokens(bundle):
    """A doll's 16 x 16 latent: 1024, 256 and 64 tokens of four references at factors 1, 2, 4."""
    budgets = m.imitate_ratios({1: 16.0, 2: 3.0, 4: 1.0}, bundle)  # 256 / 3 is rounded up
    assert budgets == {
        "input_0": 64, "input_1": 64, "input_2": 86, "input_3": 86,
        "input_4": 64, "input_5": 64, "middle": 64,
    }  # fmt: skip
    tokens = encode_group(bundle.base, bundle.network, make_character_case(1, 0).references)
    with torch.inference_mode():
        sites = make_network_bank(bundle.network, tokens, budgets).sites
    kept = {site: made.keys.shape[1] - 1 for site, made in sites.items()}  # less the null token
    assert kept == budgets
