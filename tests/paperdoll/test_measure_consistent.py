"""The measurement of consistent batches, on weights that were never trained."""

from __future__ import annotations

import json

import pytest
import torch
from untrained_dolls import save_untrained

from retrieval_core.paperdoll.bundle import BASE_FILE
from retrieval_core.paperdoll.generate import Sampling
from retrieval_core.paperdoll.measure_consistent import draw_batches, main, measure_agreement
from retrieval_core.paperdoll.model import load_base
from retrieval_core.training_free.consistent_batch import ConsistentBatch


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("weights"))


def test_strength_0_is_the_base_and_a_picture_depends_on_its_own_batch_only(weights):
    base, how = load_base(weights / BASE_FILE), Sampling(steps=2)
    batch = ConsistentBatch(start=0.0)
    prompts = ["standing, smile", "waving, sad", "sitting", "beach"]
    plain = draw_batches(base, prompts, 1, 2, how)
    assert torch.equal(draw_batches(base, prompts, 1, 2, how, ConsistentBatch(0.0)), plain)
    shared = draw_batches(base, prompts, 1, 2, how, batch)
    assert ((shared - plain).flatten(1).abs().amax(1) > 1e-4).all()
    first = draw_batches(base, prompts[:2], 1, 2, how, batch)
    torch.testing.assert_close(shared[:2], first, rtol=1e-4, atol=1e-5)


def test_agreement_counts_pairs_within_batches():
    bob, afro = {"hair style": "bob"}, {"hair style": "afro"}
    rest = dict.fromkeys(
        ("hair colour", "eye colour", "upper", "lower", "upper colour", "lower colour"), "x"
    )
    found = [{**rest, **hair} for hair in (bob, bob, afro, bob, bob, bob)]
    agreed = measure_agreement(found, 3)
    assert agreed["hair style"] == round(100 * 4 / 6, 2)
    assert agreed["eye colour"] == 100 and agreed["mean"] == round(400 / 5 + 66.67 / 5, 2)


def test_the_command_prints_one_json_object(weights, capsys):
    arguments = "--groups 1 --batch 2 --steps 1 --strength 0.5 1 --one-prompt --json --weights"
    assert main([*arguments.split(), str(weights)]) == 0
    result = json.loads(capsys.readouterr().out)
    lines = [name for name in result if name.startswith(("without", "strength"))]
    assert len(lines) == 3 and result["sharing step over the base's"] > 0
    for name in lines:
        assert 0 <= result[name]["agreement"]["mean"] <= 100
        assert set(result[name]["text followed"]) == {"expression", "background"}


def test_refusals_are_one_sentence(weights, capsys):
    for wrong in (["--groups", "0"], ["--batch", "1"], ["--strength", "2"], ["--end", "-1"]):
        assert main(["--groups", "1", *wrong, "--weights", str(weights)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and ". " not in message
