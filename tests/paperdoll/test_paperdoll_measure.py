"""The measurement itself: the judge on known truth, the arithmetic, and the bundled weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval_core.paperdoll import measure as m
from retrieval_core.paperdoll.batches import to_images
from retrieval_core.paperdoll.bundle import Bundle, find_bundled, load_bundle
from retrieval_core.paperdoll.cases import make_character_case, make_composition_case
from retrieval_core.paperdoll.draw import render
from retrieval_core.paperdoll.generate import (
    Sampling,
    apply_bank,
    encode_group,
    encode_groups,
    generate,
)
from retrieval_core.paperdoll.judge import ATTRIBUTES, index_truth, list_truth
from retrieval_core.paperdoll.world import (
    EYE_COLOURS,
    Figure,
    is_held_out,
    random_identity,
    random_outfit,
    random_scene,
)

QUICK = Sampling(steps=3)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle()


def figures(count: int, seed: int) -> list[Figure]:
    rng = np.random.default_rng(seed)
    return [
        Figure(random_identity(rng), random_outfit(rng), random_scene(rng)) for _ in range(count)
    ]


def pictures(drawn: list[Figure]) -> torch.Tensor:
    return to_images(np.stack([render(figure).image for figure in drawn]))


@pytest.mark.parametrize("through_vae", [False, True])
def test_the_judge_is_right_on_known_truth(bundle, through_vae):
    drawn = figures(400, 4242)
    images = pictures(drawn)
    if through_vae:
        images = bundle.base.vae.decode(bundle.base.vae.encode(images))
    read = bundle.judge.read(images)
    # Patterns of one or two pixels are hard to tell at this size; no line of the measurement asks
    # for them.
    measured = [name for name in ATTRIBUTES if name != "upper pattern"]
    assert {name for names in m.LINES.values() for name in names} | set(m.FREE) <= set(measured)
    rates = [
        np.mean([r[name] == list_truth(f)[name] for r, f in zip(read, drawn, strict=True)])
        for name in measured
    ]
    assert min(rates) >= 0.975 and np.mean(rates) >= 0.99, dict(zip(measured, rates))


def test_the_judge_sees_each_change_of_one_attribute(bundle):
    """No attribute is read off another one: changing the eyes alone changes the eyes alone."""
    figure = figures(1, 7)[0]
    changed = [
        replace(figure, identity=replace(figure.identity, eye_colour=colour))
        for colour in EYE_COLOURS
    ]
    read = bundle.judge.read(pictures(changed))
    assert [r["eye colour"] for r in read] == list(EYE_COLOURS)
    assert len({r["hair colour"] for r in read}) == 1
    assert len({r["upper colour"] for r in read}) == 1


def test_truth_ids_index_the_truth():
    for figure in figures(20, 1):
        values = list_truth(figure)
        for index, (name, names) in zip(index_truth(figure), ATTRIBUTES.items(), strict=True):
            assert names[index] == values[name]


def test_cases_are_held_out_and_references_show_what_is_wanted():
    for index in range(10):
        case = make_character_case(1, index)
        assert len(case.references) == 4
        for source in case.sources:
            assert is_held_out(source.figure.identity)
            assert is_held_out(source.figure.outfit)
            shown = list_truth(source.figure)
            assert all(shown[name] == value for name, value in case.wanted.items())
            assert shown["background"] == case.reference_background
        parts = make_composition_case(1, index)
        face, body = list_truth(parts.sources[0].figure), list_truth(parts.sources[2].figure)
        assert [r.concept for r in parts.references] == ["face", "face", "clothes", "clothes"]
        assert face["hair colour"] == parts.wanted["hair colour"]
        assert body["upper colour"] == parts.wanted["upper colour"]
        assert parts.sources[0].figure.outfit != parts.sources[2].figure.outfit
        assert parts.sources[0].figure.identity != parts.sources[2].figure.identity


def test_another_seed_gives_other_characters():
    first = {make_character_case(1, i).sources[0].figure for i in range(20)}
    again = {make_character_case(1, i).sources[0].figure for i in range(20)}
    other = {make_character_case(2, i).sources[0].figure for i in range(20)}
    assert first == again and not first & other


def test_rates_are_shares_of_hits():
    cases = [make_character_case(3, i) for i in range(4)]
    perfect = [{**case.wanted, **case.said} for case in cases]
    assert set(m.measure_matches(cases, perfect).values()) == {100.0}
    assert set(m.measure_following(cases, perfect).values()) == {100.0}
    wrong = [dict(attributes) for attributes in perfect]
    wrong[0]["hair style"] = "none"
    wrong[0]["upper"] = wrong[1]["lower"] = "none"
    rates = m.measure_matches(cases, wrong)
    assert rates["hair style"] == 75.0 and rates["garment kind"] == 75.0
    assert rates["mean"] == 90.0
    leaked = [{"background": case.reference_background} for case in cases[:2]]
    leaked += [{"background": "elsewhere"}] * 2
    assert m.measure_leak(cases, leaked) == 50.0


def test_diversity_counts_pairs_within_a_conditioning():
    same = {name: "a" for name in m.FREE}
    other = {name: "b" for name in m.FREE}
    assert m.measure_diversity([same] * 4, 2) == {name: 0.0 for name in m.FREE}
    assert m.measure_diversity([same, other, same, other], 2)["pose"] == 100.0
    assert m.measure_diversity([same, same, other, other], 2)["pose"] == 0.0
    # Three figures, two alike: 2 of 3 pairs differ.
    assert m.measure_diversity([same, same, other], 3)["pose"] == pytest.approx(66.67)


def test_chance_levels_are_those_of_the_world():
    levels = m.compute_chance_levels()
    assert levels["hair style"] == 12.5 and levels["eye colour"] == pytest.approx(16.67)
    assert levels["garment kind"] == pytest.approx(100 * (1 / 6 + 1 / 5) / 2, abs=0.01)


def test_strength_zero_empty_bank_and_fresh_network_are_bit_for_bit_the_base(bundle):
    assert m.check_exactness(bundle, QUICK) == {
        "strength 0": True,
        "empty bank": True,
        "fresh network": True,
    }


def test_retrieval_changes_the_picture_and_is_deterministic(bundle):
    case = make_character_case(1, 0)
    noise = bundle.base.noise(1, torch.Generator().manual_seed(3))

    def run(how: Sampling = QUICK) -> torch.Tensor:
        tokens = encode_group(bundle.base, bundle.network, case.references)
        return generate(bundle, [case.prompt], noise, apply_bank(bundle.network, tokens, how), how)

    assert torch.equal(run(), run())
    assert not torch.equal(run(), generate(bundle, [case.prompt], noise, None, QUICK))


def test_batched_banks_generate_what_single_banks_do(bundle):
    cases = [make_character_case(1, i, masked=True) for i in range(2)]
    noise = bundle.base.noise(2, torch.Generator().manual_seed(3))
    batched = encode_groups(bundle.base, bundle.network, [case.references for case in cases])
    together = generate(
        bundle, [c.prompt for c in cases], noise, apply_bank(bundle.network, batched, QUICK), QUICK
    )
    for i, case in enumerate(cases):
        tokens = encode_group(bundle.base, bundle.network, case.references)
        alone = generate(
            bundle, [case.prompt], noise[i : i + 1],
            apply_bank(bundle.network, tokens, QUICK), QUICK,
        )  # fmt: skip
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)


def test_the_map_names_the_reference_retrieved_from(bundle):
    case = make_composition_case(1, 0)
    tokens = encode_group(bundle.base, bundle.network, case.references)
    retrieval = apply_bank(bundle.network, tokens, QUICK)
    noise = bundle.base.noise(2, torch.Generator().manual_seed(3))
    generate(bundle, [case.prompt] * 2, noise, retrieval, QUICK)
    shares = retrieval.shares.mean()
    assert shares.shape == (2, 5, 8, 8)
    assert retrieval.shares.seen.unique().tolist() == [QUICK.steps]
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 8, 8))


def test_measure_prints_one_json_object_with_every_line(capsys):
    assert m.main(["--count", "4", "--seed", "5", "--steps", "2", "--json"]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(printed) == 1
    result = json.loads(printed[0])
    assert result["figures"] == 4 and result["seed"] == 5
    for line in ("attribute match with four references", "concept composition"):
        assert set(result[line]) == {"with retrieval", "without retrieval", "chance"}


def test_measuring_nothing_is_refused(capsys):
    assert m.main(["--count", "0"]) == 2 and "0 figures" in capsys.readouterr().err
    assert m.main(["--weights", "/nowhere"]) == 2
    assert "missing" in capsys.readouterr().err


def test_bundled_weights_are_25_mb_at_most_together():
    folder = find_bundled("paperdoll_base.safetensors").parent
    assert sum(path.stat().st_size for path in Path(folder).iterdir()) <= 25_000_000


@pytest.mark.slow
def test_the_bundled_weights_reach_the_floors(bundle):
    result = m.measure(bundle, 200, 12, Sampling())
    four = result["attribute match with four references"]
    assert four["with retrieval"]["mean"] >= 88
    assert abs(four["without retrieval"]["mean"] - four["chance"]["mean"]) < 5
    assert result["concept composition"]["with retrieval"]["mean"] >= 82
