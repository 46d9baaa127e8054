"""The measurement of the training-free mode, on weights that were never trained."""

from __future__ import annotations

import json

import pytest
import torch
from untrained_dolls import save_untrained

from retrieval_core.bank.encoding import split_features
from retrieval_core.paperdoll.bundle import BASE_FILE, Bundle
from retrieval_core.paperdoll.cases import make_character_case, make_composition_case
from retrieval_core.paperdoll.generate import Sampling, apply_training_free, generate
from retrieval_core.paperdoll.measure_training_free import generate_pictures, main
from retrieval_core.paperdoll.model import load_base
from retrieval_core.training_free import TrainingFree, record


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def base(weights):
    return load_base(weights / BASE_FILE)


def test_without_retrieval_is_the_base_models_picture_and_with_it_is_not(base):
    cases = [make_character_case(1, i, masked=True) for i in range(2)]
    noise = base.noise(2, torch.Generator().manual_seed(0))
    how, prompts = Sampling(steps=2), [case.prompt for case in cases]
    plain = generate_pictures(base, cases, noise, how)
    assert torch.equal(plain, generate(Bundle(base, None, None), prompts, noise, None, how))
    for choices in ({}, {"layers": "all"}, {"layers": "all", "adain": True}):
        network = TrainingFree.from_unet(base.unet, "paperdoll", **choices)
        found = generate_pictures(base, cases, noise, how, network)
        assert (found - plain).abs().max() > 1e-4
    assert torch.equal(generate_pictures(base, cases, noise, how, network, 0.0), plain)


def test_batched_banks_hold_the_keys_of_each_reference(base):
    cases = [make_composition_case(1, i, masked=True) for i in range(2)]
    network = TrainingFree.from_unet(base.unet, "paperdoll", layers="all", levels=1)
    with torch.inference_mode():
        groups = [case.references for case in cases]
        bank = apply_training_free(base, network, groups, 1.0, "cond").bank
        for g, case in enumerate(cases):
            latents = base.vae.encode(torch.stack([r.image for r in case.references]))
            context = base.text.encode([r.concept for r in case.references])
            features = record(base.unet, base.schedule, network, latents, context)
            features = {site: features[site] for site in network.maker.sites}
            made = split_features(features, latents.shape[2:], [r.mask for r in case.references])
            for site, held in bank.sites.items():
                seen = torch.ones_like(held.owner, dtype=bool)
                if held.bias is not None:
                    seen = held.bias[g] == 0
                for r, reference in enumerate(made):
                    mine = held.keys[g][seen & (held.owner == r)]
                    torch.testing.assert_close(
                        mine, reference.tokens[site][0], rtol=1e-4, atol=1e-5
                    )


def test_the_command_prints_one_json_object(weights, capsys):
    arguments = "--count 2 --steps 1 --levels 1 2 --json --task composition --weights".split()
    assert main([*arguments, str(weights)]) == 0
    result = json.loads(capsys.readouterr().out)
    lines = [name for name in result if "levels" in name or "without" in name]
    assert len(lines) == 3 and result["figures"] == 2
    for name in lines:
        assert 0 <= result[name]["attribute match"]["mean"] <= 100


def test_refusals_are_one_sentence(weights, tmp_path, capsys):
    for wrong in (["--count", "0"], ["--levels", "0"], ["--layers", "roof"], ["--strength", "-1"]):
        assert main(["--count", "1", *wrong, "--weights", str(weights)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and ". " not in message
    assert main(["--weights", str(tmp_path)]) == 2
    assert "missing" in capsys.readouterr().err
