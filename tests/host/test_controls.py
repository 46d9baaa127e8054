"""Retrieval Controls in the host: curve, groups, soft regions and token budget while sampling."""

from __future__ import annotations

import math

import pytest
import torch
from dolls import Dolls
from retrieval_pack.nodes.apply_reference_retrieval import RetrievalApplyReferences
from retrieval_pack.nodes.host import step_context
from retrieval_pack.nodes.host.apply import apply_references
from retrieval_pack.nodes.retrieval_controls import (
    ALL_TOKENS,
    CUSTOM,
    LIMITED,
    NUMBERS,
    RetrievalControls,
)
from retrieval_pack.retrieval_core.sampling.applications import Retrieval
from retrieval_pack.retrieval_core.sampling.controls import Controls, parse_curve
from retrieval_pack.retrieval_core.sampling.frozen_site import FrozenSite
from retrieval_pack.retrieval_core.sampling.presets import PRESETS
from retrieval_pack.retrieval_core.sampling.regions import soften

DEFAULTS = {
    given.id: given.default for given in RetrievalControls.GET_SCHEMA().inputs if given.id != "seed"
}


@pytest.fixture(scope="module")
def dolls(tmp_path_factory):
    with torch.inference_mode():
        return Dolls(tmp_path_factory.mktemp("dolls"))


@pytest.fixture(scope="module")
def refs(dolls):
    with torch.inference_mode():
        return dolls.references(3)


def controls(**changed):
    (value,) = RetrievalControls.execute(**{**DEFAULTS, **changed}).args
    return value


def patch_of(model):
    return model.model_options["transformer_options"]["patches"]["output_block_patch"][0]


def test_the_nodes_defaults_are_the_controls_defaults_and_apply_uses_them(dolls, refs):
    assert controls() == Controls()
    (bare,) = RetrievalApplyReferences.execute(dolls.model, refs, 1.0, 0.0, 1.0, "cond").args
    given = RetrievalApplyReferences.execute(
        dolls.model, refs, 1.0, 0.0, 1.0, "cond", None, controls()
    )
    ours, theirs = (patch_of(m).retrieval for m in (bare, given.args[0]))
    assert ours.bank is theirs.bank  # limited once, for both
    assert torch.equal(dolls.sample(bare), dolls.sample(given.args[0]))


def test_constant_everything_is_bit_for_bit_no_controls(dolls, refs):
    every = controls(tokens=ALL_TOKENS)
    plain = dolls.sample(apply_references(dolls.model, refs, 1.3, controls=every))
    same = controls(strength_curve=NUMBERS, curve_numbers="1, 1, 1", tokens=ALL_TOKENS)
    assert torch.equal(dolls.sample(apply_references(dolls.model, refs, 1.3, controls=same)), plain)
    half = controls(strength_curve=NUMBERS, curve_numbers="0.5", tokens=ALL_TOKENS)
    halved = dolls.sample(apply_references(dolls.model, refs, 1.3, controls=half))
    weaker = dolls.sample(apply_references(dolls.model, refs, 0.65, controls=every))
    torch.testing.assert_close(halved, weaker)


@pytest.mark.parametrize("off", ["0", "0, 0"])
def test_a_curve_or_groups_of_zero_are_bit_for_bit_the_base(dolls, refs, off):
    base = dolls.sample(dolls.model)
    flat = controls(strength_curve=NUMBERS, curve_numbers=off)
    assert torch.equal(dolls.sample(apply_references(dolls.model, refs, 1.0, controls=flat)), base)
    none = controls(act_on=CUSTOM, composition=0.0, middle=0.0, detail=0.0)
    assert torch.equal(dolls.sample(apply_references(dolls.model, refs, 1.0, controls=none)), base)


def test_the_curve_follows_the_hosts_percentages(dolls, refs, monkeypatch):
    """At each step: strength x curve((percent - start) / (end - start))."""
    seen = {}
    original = Retrieval.add_retrieved

    def spy(self, site, h, rows, strength):
        seen[float(now["sigma"])] = strength
        return original(self, site, h, rows, strength)

    now = {}
    monkeypatch.setattr(Retrieval, "add_retrieved", spy)
    chosen = controls(strength_curve=NUMBERS, curve_numbers="0, 1, 0.2")
    patched = apply_references(dolls.model, refs, 2.0, 0.1, 0.9, controls=chosen)
    mine = patch_of(patched)
    call = type(mine).__call__
    monkeypatch.setattr(
        type(mine),
        "__call__",
        lambda self, h, hsp, to: (now.update(sigma=to["sigmas"][0]), call(self, h, hsp, to))[1],
    )
    dolls.sample(patched, steps=8)
    sampling = dolls.model.get_model_object("model_sampling")
    curve = parse_curve("0, 1, 0.2")
    assert 3 <= len(seen) < 8
    for sigma, strength in seen.items():
        percent = 1 - float(sampling.timestep(torch.tensor([sigma]))) / 999
        assert 0.1 <= percent <= 0.9
        # `timestep` rounds to a whole one of the 1000, the curve does not.
        assert strength == pytest.approx(2 * curve.at((percent - 0.1) / 0.8), abs=0.01)


@pytest.mark.parametrize("percent", [0.013, 0.25, 0.5, 0.77, 0.99])
def test_progress_inverts_percent_to_sigma(dolls, percent):
    sampling = dolls.model.get_model_object("model_sampling")
    sigma = torch.tensor([float(sampling.percent_to_sigma(percent))])
    noted = step_context.StepContext(sampling, sigma, (16, 16), {}, frozenset())
    assert noted.progress == pytest.approx(percent, abs=1e-4)


def test_groups_change_only_their_sites(dolls, refs, monkeypatch):
    """Sites by depth: the host's sites of 16x16, 8x8 and 4x4 positions."""
    acted = set()
    original = FrozenSite.add_retrieved

    def spy(self, h, bank, strength, region=None):
        acted.add((h.shape[-1], strength))
        return original(self, h, bank, strength, region)

    monkeypatch.setattr(FrozenSite, "add_retrieved", spy)
    for preset, expected in (
        ("detail only", {(16, 1.0)}),
        ("middle only", {(8, 1.0)}),
        ("composition only", {(4, 1.0)}),
        ("all", {(16, 1.0), (8, 1.0), (4, 1.0)}),
    ):
        acted.clear()
        chosen = controls(act_on=preset)
        dolls.sample(apply_references(dolls.model, refs, 1.0, controls=chosen), steps=1)
        assert acted == expected, preset
    acted.clear()
    custom = controls(act_on=CUSTOM, composition=0.25, middle=0.0, detail=2.0)
    dolls.sample(apply_references(dolls.model, refs, 2.0, controls=custom), steps=1)
    assert acted == {(16, 4.0), (4, 0.5)}


def test_a_blurred_region_is_the_softened_mask(dolls, refs):
    region = torch.zeros(1, 32, 32)
    region[..., 12:] = 1
    blurred = apply_references(
        dolls.model, refs, 1.0, region=region, controls=controls(region_blur=3)
    )
    by_hand = soften(region[0], 3.0)[None]
    given = apply_references(dolls.model, refs, 1.0, region=by_hand, controls=controls())
    assert torch.equal(dolls.sample(blurred), dolls.sample(given))
    sharp = apply_references(dolls.model, refs, 1.0, region=region, controls=controls())
    assert not torch.equal(dolls.sample(blurred), dolls.sample(sharp))


def test_a_budget_bounds_every_site_for_any_number_of_references(dolls):
    for count in (1, 4):
        refs = dolls.references(count)
        chosen = controls(tokens=LIMITED, token_budget=40)
        mine = patch_of(apply_references(dolls.model, refs, 1.0, controls=chosen))
        sizes = {name: s.keys.shape[1] - 1 for name, s in mine.retrieval.bank.sites.items()}
        assert max(sizes.values()) == 40
        assert mine.retrieval.bank.references == count
    # Within the budget nothing is touched, and all tokens means all of them.
    large = controls(tokens=LIMITED, token_budget=1024)
    large = apply_references(dolls.model, refs, 1.0, controls=large)
    every = apply_references(dolls.model, refs, 1.0, controls=controls(tokens=ALL_TOKENS))
    assert torch.equal(dolls.sample(large), dolls.sample(every))


def test_the_automatic_budget_follows_the_sites_resolution(dolls):
    """Of references of 128 x 128 pixels: sites of 32 x 32, 16 x 16 and 8 x 8 positions."""
    refs = dolls.references(8, size=128)
    mine = patch_of(apply_references(dolls.model, refs, 1.0))
    sizes = {name: s.keys.shape[1] - 1 for name, s in mine.retrieval.bank.sites.items()}
    assert sizes["input_0"] == sizes["input_3"] == 512  # 16 x 16 is less than the least
    assert sizes["middle"] == 512
    refs = dolls.references(2, size=256)
    mine = patch_of(apply_references(dolls.model, refs, 1.0))
    sizes = {name: s.keys.shape[1] - 1 for name, s in mine.retrieval.bank.sites.items()}
    assert sizes["input_0"] == sizes["input_3"] == 32 * 32 and sizes["middle"] == 2 * 16 * 16


def test_a_budget_of_equal_references_loses_nothing(dolls):
    one = dolls.references(1)
    four = type(one)(one.network, one.encoded * 4)
    limited = apply_references(
        dolls.model, four, 1.0, controls=controls(tokens=LIMITED, token_budget=256)
    )
    heavy = type(one)(one.network, (one.encoded[0].with_weight(4.0),))
    whole = apply_references(dolls.model, heavy, 1.0, controls=controls(tokens=ALL_TOKENS))
    out, expected = dolls.sample(limited), dolls.sample(whole)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_the_bank_is_kept_while_only_the_strength_changes(dolls, refs, monkeypatch):
    calls = []
    network = type(refs.network)
    original = network.make_bank

    def spy(self, tokens, budget):
        if len(tokens.sites) > 1:  # not the map's site alone
            calls.append(budget)
        return original(self, tokens, budget)

    monkeypatch.setattr(network, "make_bank", spy)
    again = type(refs)(refs.network, refs.encoded)
    before = again.get_ram_usage()
    for strength, budget in ((1.0, 30), (0.5, 30), (0.5, 20)):
        limited = controls(tokens=LIMITED, token_budget=budget)
        apply_references(dolls.model, again, strength, controls=limited)
    for strength in (0.5, 1.0):
        apply_references(dolls.model, again, strength)
    assert calls == [30, 20, "automatic"]
    assert again.get_ram_usage() > before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"strength_curve": NUMBERS, "curve_numbers": "1, high"}, "'high'"),
        ({"strength_curve": NUMBERS, "curve_numbers": ""}, "where a number belongs"),
        ({"tokens": LIMITED, "token_budget": 0}, "token budget is 0"),
        ({"act_on": CUSTOM, "detail": math.inf}, "inf"),
    ],
)
def test_bad_controls_are_one_sentence(changed, words):
    with pytest.raises(ValueError) as caught:
        controls(**changed)
    message = str(caught.value)
    assert words in message and message.endswith(".") and ". " not in message


def test_a_preset_sets_strength_and_end_of_a_trained_network(dolls, refs):
    def acting(**chosen):
        made = RetrievalApplyReferences.execute(
            dolls.model, refs, 0.8, 0.0, 0.9, "cond", None, None, **chosen
        )
        retrieval = patch_of(made.args[0]).retrieval
        return retrieval.strength, retrieval.end

    strength = 0.8 * refs.network.recommended["strength"]
    for name, preset in PRESETS.items():
        assert acting(preset=name) == (strength * preset.strength, min(0.9, preset.end))
    assert acting() == acting(preset="balanced") == (strength, 0.9)
