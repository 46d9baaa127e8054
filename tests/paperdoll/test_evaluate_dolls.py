"""The evaluation on paper dolls: characters, both methods of the core, the judge, the command."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from refusal import sentence

from retrieval_core.evaluate.protocol import Protocol
from retrieval_core.network.controlnet import RetrievalControlNet
from retrieval_core.paperdoll import bundle as bundles
from retrieval_core.paperdoll import evaluate_dolls as command
from retrieval_core.paperdoll.doll_characters import PROMPTS, draw_characters
from retrieval_core.paperdoll.doll_methods import TrainedMethod, TrainingFreeMethod
from retrieval_core.paperdoll.doll_scorer import PaperdollScorer, parse_prompt
from retrieval_core.paperdoll.generate import (
    Sampling,
    apply_bank,
    draw_noise,
    encode_group,
    generate,
)
from retrieval_core.paperdoll.judge import Judge
from retrieval_core.paperdoll.model import PaperdollModel
from retrieval_core.paperdoll.text import Tokenizer
from retrieval_core.paperdoll.vae import PatchVAE

SMALL = Protocol(2, 1, 2, PROMPTS, 2, 2, seed=5)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A folder of paper-doll weights of true shapes; the network's zero convolutions are not 0."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    base = PaperdollModel()
    base.vae = PatchVAE.fit(torch.rand(4, 3, 64, 64), base.vae.channels)
    base.save(folder / bundles.BASE_FILE)
    made = RetrievalControlNet.from_base(
        base.unet.state_dict(), "paperdoll", config=base.unet.config
    )
    for site in made.retrieval.values():
        torch.nn.init.normal_(site.zero_conv.weight, std=0.2)
    made.save(folder / bundles.RETRIEVAL_FILE)
    Judge().save(folder / bundles.JUDGE_FILE)
    return folder


def test_the_tokenizer_knows_the_prompts():
    for prompt in PROMPTS:
        Tokenizer()(prompt)
        assert parse_prompt(prompt)


def test_paper_dolls_are_apart_and_reproducible():
    ours, again = draw_characters(SMALL), draw_characters(SMALL)
    assert [c.domain for c in ours] == ["in-domain", "in-domain", "held-out"]
    assert len({tuple(c.truth.items()) for c in ours}) == 3
    for a, b in zip(ours, again):
        assert a.truth == b.truth and len(a.references) == 2
        assert torch.equal(a.references[1].image, b.references[1].image)
    other = draw_characters(replace(SMALL, seed=6))
    assert [c.truth for c in other] != [c.truth for c in ours]


@pytest.mark.parametrize("kind", ["trained", "training-free"])
def test_weight_zero_is_the_base_model_and_noise_is_shared(untrained, kind):
    bundle = bundles.load_bundle(untrained)
    characters = {c.name: c for c in draw_characters(SMALL)}

    def made(how):
        if kind == "trained":
            return TrainedMethod(bundle, (0.0, 1.0), how)
        return TrainingFreeMethod(bundle.base, (0.0, 1.0), how)

    method = made(Sampling(steps=1))
    assert method.name == kind
    runs = list(SMALL.runs(list(characters)))[:2]
    plain, found = (method.draw(runs, characters, weight) for weight in (0.0, 1.0))
    assert [p.shape for p in plain] == [(2, 3, 64, 64)] * 2
    assert not torch.equal(plain[0], found[0])
    noise = torch.cat([draw_noise(bundle.base, runs[0].seed, sample) for sample in range(2)])
    expected = generate(bundle, [runs[0].prompt] * 2, noise, None, Sampling(steps=1))
    torch.testing.assert_close(plain[0], expected, atol=1e-4, rtol=0)
    if kind == "trained":
        references = characters[runs[0].character].references
        tokens = encode_group(bundle.base, bundle.network, references)
        how = Sampling(steps=1, strength=1.0)
        expected = generate(
            bundle, [runs[0].prompt] * 2, noise, apply_bank(bundle.network, tokens, how), how
        )
        torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=0)
    assert not torch.equal(plain[0][0], plain[0][1]) and not torch.equal(plain[0], plain[1])
    assert made(Sampling(steps=2)).digest != method.digest


def test_the_command_draws_scores_and_writes(untrained, tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--weights", str(untrained), "--steps", "1"]
    arguments += ["--in-domain", "1", "--held-out", "1", "--seeds", "1", "--samples", "2"]
    assert command.main([*arguments, "--strengths", "0", "1", "--training-free"]) == 0
    printed = capsys.readouterr().out
    assert "attribute match" in printed and "frontier.png" in printed
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2 * 5
    assert all((tmp_path / name).is_file() for row in rows for name in row["pictures"])
    assert command.main([*arguments, "--name", "training-free", "--training-free"]) == 2
    assert "Two methods" in capsys.readouterr().err
    assert command.main([*arguments, "--report", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert [line["weight"] for line in lines] == [0.0, 0.0, 1.0, 1.0] * 2
    for line in lines:
        kind = line["method"], line["weight"], line["characters"]
        mine = [row for row in rows if (row["method"], row["weight"], row["domain"]) == kind]
        values = [v for row in mine for v in row["scores"]["attribute match"]]
        assert line["attribute match"] == pytest.approx(np.mean(values), abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "0"], "0 samples"),
        (["--in-domain", "0", "--held-out", "0"], "at least one"),
        (["--seeds", "1", "--samples", "1"], "pair"),
        (["--prompts", "/nowhere/prompts.txt"], "/nowhere/prompts.txt"),
        (["--strengths", "-1"], "-1"),
        (["--seed", "-1"], "-1"),
        (["--no-core"], "no method"),
        (["--no-core", "--workflow", "file.json"], "NAME=FILE.json"),
        (["--no-core", "--workflow", "a=/nowhere/a.json"], "/nowhere/a.json"),
        (["--weights", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_arguments_get_one_sentence(tmp_path, capsys, arguments, words):
    assert command.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_the_judge_refuses_pictures_of_another_size():
    (run, *_) = SMALL.runs(["a"])
    message = sentence(
        PaperdollScorer(Judge()).score, run, draw_characters(SMALL)[0], torch.zeros(1, 3, 128, 64)
    )
    assert "64 x 128" in message
