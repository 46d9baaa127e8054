"""The measurement of the controls: what it compares, and where each region acts."""

from __future__ import annotations

import json

import pytest
import torch

from retrieval_core.paperdoll import measure_controls as m
from retrieval_core.paperdoll.bundle import load_bundle
from retrieval_core.paperdoll.cases import same_character_case
from retrieval_core.paperdoll.generate import Sampling, gathered, retrieval_of
from retrieval_core.sampling.applications import Several

QUICK = Sampling(steps=2)


@pytest.fixture(scope="module")
def bundle():
    return load_bundle()


def retrieval(bundle, index, **changes):
    tokens = gathered(bundle.base, bundle.network, same_character_case(1, index).references)
    how = Sampling(steps=2, **changes)
    return retrieval_of(bundle.network, tokens, how)


def test_several_add_what_each_adds(bundle):
    """Retrieval reads the features as they are then, so the second sees the first one's work."""
    left, right = (m._in_half(retrieval(bundle, i), i) for i in range(2))
    h = torch.randn(2, 64, 16, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        hook = Several([left, right]).hook([0, 1], 0.5)
        assert hook is not None
        found = hook("input_0", h)
        expected = right.apply("input_0", left.apply("input_0", h, [0, 1]), [0, 1])
    assert torch.equal(found, expected)
    # Each acts in its own half (its soft edge aside), and on the conditional row.
    alone = left.apply("input_0", h, [0, 1])
    assert torch.equal(alone[..., 18:], h[..., 18:]) and not torch.equal(alone, h)
    assert torch.equal(found[1], h[1])


def test_several_without_anything_to_do_leave_the_model_alone(bundle):
    off = retrieval(bundle, 0, strength=0.0)
    assert Several([off, off]).hook([0], 0.5) is None and Several([]).hook([0], 0.5) is None
    assert Several([off, retrieval(bundle, 1)]).hook([0], 0.5) is not None


def test_the_other_half_keeps_its_own_character(bundle, monkeypatch):
    """Changing the right one's references changes the right half; without regions, both alike."""
    cases = [same_character_case(1, i) for i in range(12)]
    lefts, noise = cases[:4], m._wide_noise(bundle, 1, 0, 4)

    def share_on_the_right():
        first, other = (
            m.pairs(bundle, lefts, rights, noise, QUICK) for rights in (cases[4:8], cases[8:])
        )
        change = (first - other).abs().mean((0, 1, 2))
        assert change.shape == (128,)
        return float(change[72:].mean() / (change[72:].mean() + change[:56].mean()))

    assert share_on_the_right() > 0.67
    changed = [
        m.pairs(bundle, lefts, r, noise, QUICK, by_area=True) for r in (cases[4:8], cases[8:])
    ]
    left, right = (changed[0] - changed[1]).split(64, -1)
    assert not left.any() and right.abs().mean() > 0.01
    monkeypatch.setattr(m, "_in_half", lambda retrieval, place: retrieval)
    assert 0.4 < share_on_the_right() < 0.6


def test_every_line_is_measured_and_printed_as_one_json_object(monkeypatch, capsys):
    monkeypatch.setattr(m, "Sampling", lambda: QUICK)
    assert m.main(["--count", "2", "--seed", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"figures", "seed", *m.LINES}
    four = result["token budget"]["four references"]
    assert four["lost, points"] == pytest.approx(
        four["all tokens"]["mean"] - four["default budget"]["mean"], abs=0.01
    )
    pooled = result["query pooling"]["composition"]
    assert pooled["lost, points"] == pytest.approx(
        pooled["each place"]["mean"] - pooled["pooled"]["mean"], abs=0.01
    )
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

    class Measured(m.Measurement):
        def read(self, cases, retrieve, name):
            layers = self.bundle.network.retrieval
            seen.append({site: layer.pool for site, layer in layers.items()})
            return super().read(cases, retrieve, name)

    monkeypatch.setattr(m, "Measurement", Measured)
    m.pooling_lines(bundle, 1, 3, QUICK)
    factors = bundle.network.config.site_downsampling()
    pooled = {site: 2 if factor == 1 else 1 for site, factor in factors.items()}
    assert seen == [dict.fromkeys(factors, 1), pooled] * 2
    assert {layer.pool for layer in bundle.network.retrieval.values()} == {1}
