"""The evaluation: its protocol, resuming, the table's arithmetic, and the command itself."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from refusal import sentence

from retrieval_core.evaluate import __main__ as command
from retrieval_core.evaluate import summary
from retrieval_core.evaluate.characters import Character, from_folder, paperdolls
from retrieval_core.evaluate.evaluation import Evaluation, picture_name
from retrieval_core.evaluate.frontier import _axis, plot
from retrieval_core.evaluate.ledger import Ledger
from retrieval_core.evaluate.methods import TrainedMethod, TrainingFreeMethod
from retrieval_core.evaluate.protocol import PAPERDOLL, PRESETS, RETRIBOORU, Protocol
from retrieval_core.evaluate.scores import ModelScorer, PaperdollScorer, said_by
from retrieval_core.metrics import Estimate
from retrieval_core.network.controlnet import RetrievalControlNet
from retrieval_core.paperdoll import bundle as bundles
from retrieval_core.paperdoll.generate import Sampling, gathered, generate, retrieval_of
from retrieval_core.paperdoll.judge import Judge
from retrieval_core.paperdoll.model import PaperdollModel
from retrieval_core.paperdoll.text import Tokenizer
from retrieval_core.paperdoll.vae import PatchVAE

SMALL = Protocol(2, 1, 2, ("first", "second"), 2, 3, seed=5)


class Scripted:
    """A method whose pictures say who and what they are in their first pixel."""

    batch = 4

    def __init__(self, name="scripted", weights=(0.0, 1.0), stop_after=None, digest="d"):
        self.name, self.weights, self.digest = name, weights, digest
        self.stop_after, self.drawn = stop_after, []

    def draw(self, runs, characters, weight):
        if self.stop_after is not None and len(self.drawn) >= self.stop_after:
            raise KeyboardInterrupt
        self.drawn += [(run.key, weight) for run in runs]
        found = []
        for run in runs:
            pictures = torch.zeros(run.samples, 3, 64, 64)
            pictures[:, 0] = (len(run.character) % 7) / 10 + 0.05 * (weight or 0)
            pictures[:, 1] = torch.arange(run.samples)[:, None, None] / 10
            found.append(pictures)
        return found


class Pixels:
    """A scorer that reads the mean colours; answers are the sample's number."""

    similarity, text = "red", "green"
    digest: ClassVar[dict] = {"scores": "pixels"}

    def score(self, run, character, pictures):
        scores = {
            name: (100 * pictures[:, i].mean((1, 2))).tolist()
            for i, name in enumerate((self.similarity, self.text))
        }
        return scores, {"which": [str(round(10 * float(p[1].mean()))) for p in pictures]}

    def diversity(self, answers, similarity):
        from retrieval_core.metrics import score_answers

        class OneHot:
            def embed_texts(self, texts):
                return torch.eye(16)[[int(text) for text in texts]]

        return score_answers(answers, OneHot(), similarity)


def dolls(protocol: Protocol = SMALL) -> list[Character]:
    return paperdolls(replace(protocol, prompts=PAPERDOLL))


def evaluated(folder, methods, protocol=SMALL):
    evaluation = Evaluation(folder, protocol, dolls(protocol), Pixels())
    evaluation.run(methods)
    evaluation.report()
    return evaluation


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


def test_the_defaults_are_the_papers():
    assert Protocol().pictures == 5000
    assert (Protocol().held_out, Protocol().in_domain, Protocol().references) == (10, 40, 4)
    assert [len(prompt.split(", ")) for prompt in RETRIBOORU] == [15, 17, 27, 17, 35]
    assert len(PAPERDOLL) == 5 and set(PRESETS) == {"retribooru", "paperdoll"}
    for prompt in PAPERDOLL:
        Tokenizer()(prompt)
        assert said_by(prompt)


def test_every_run_is_there_once():
    runs = list(SMALL.runs(["a", "b"]))
    assert len(runs) == 8 == len({run.key for run in runs})
    assert {run.seed for run in runs} == {5, 6}
    assert {(run.prompt_name, run.prompt) for run in runs} == {("P1", "first"), ("P2", "second")}


def test_paper_dolls_are_apart_and_reproducible():
    ours, again = dolls(), dolls()
    assert [c.domain for c in ours] == ["in-domain", "in-domain", "held-out"]
    assert len({tuple(c.wanted.items()) for c in ours}) == 3
    for a, b in zip(ours, again):
        assert a.wanted == b.wanted and len(a.references) == 2
        assert torch.equal(a.references[1].image, b.references[1].image)
    other = dolls(replace(SMALL, seed=6))
    assert [c.wanted for c in other] != [c.wanted for c in ours]


@pytest.mark.parametrize("torn", ["", '{"method": "scripted", "wei'])
def test_a_killed_run_goes_on_to_the_same_table(tmp_path, torn):
    whole = evaluated(tmp_path / "whole", [Scripted()])
    stopped = Scripted(stop_after=8)
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path / "cut", [stopped])
    path = tmp_path / "cut" / "runs.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 8
    path.write_text("".join(lines[:6]) + torn)  # the kill also cut a batch, and perhaps a line
    again = Scripted()
    resumed = evaluated(tmp_path / "cut", [again])
    assert len(again.drawn) == 24 - 4  # of 12 runs at two weights, one batch stood
    for name in ("table.csv", "table.md", "frontier.png", "sheet.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert resumed.ledger.rows == whole.ledger.rows
    third = Scripted()
    evaluated(tmp_path / "cut", [third])
    assert not third.drawn


def test_methods_join_a_folder_of_results(tmp_path):
    evaluated(tmp_path, [Scripted()])
    both = evaluated(tmp_path, [Scripted("another", (None,))])
    lines = summary.summarise(both.ledger.rows, both.scorer)
    assert [(ln.method, ln.weight, ln.domain) for ln in lines] == [
        ("scripted", 0.0, "in-domain"), ("scripted", 0.0, "held-out"),
        ("scripted", 1.0, "in-domain"), ("scripted", 1.0, "held-out"),
        ("another", None, "in-domain"), ("another", None, "held-out"),
    ]  # fmt: skip


def test_what_does_not_belong_together_is_refused(tmp_path):
    evaluated(tmp_path, [Scripted()])
    assert "other weights" in sentence(evaluated, tmp_path, [Scripted(digest="e")])
    assert "samples 3" in sentence(evaluated, tmp_path, [], replace(SMALL, samples=2))
    assert "'scripted'" in sentence(evaluated, tmp_path, [Scripted(), Scripted()])
    (tmp_path / "runs.jsonl").write_text("[]\n")
    assert "Line 1" in sentence(evaluated, tmp_path, [])
    (tmp_path / "settings.json").write_text("{")
    assert "settings.json" in sentence(evaluated, tmp_path, [])


def test_the_table_is_the_arithmetic_of_the_rows(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for character in ("a", "b", "c"):
        for seed in (1, 2):
            values = rng.uniform(0, 100, 2).tolist()
            rows.append(
                {
                    "method": "m", "weight": 1.0, "digest": "d", "character": character,
                    "domain": "held-out", "prompt": "P1", "seed": seed,
                    "scores": {"red": values, "green": [50.0, 70.0]},
                    "answers": {"which": ["1", str(seed)]}, "pictures": ["x", "y"],
                }
            )  # fmt: skip
    (line,) = summary.summarise(rows[::-1], Pixels())
    by_character = np.array([r["scores"]["red"] for r in rows]).reshape(3, -1).mean(1)
    assert line.pictures == 12
    assert line.scores["red"].mean == pytest.approx(by_character.mean())
    expected = np.std(by_character) / np.sqrt(3)  # the bootstrap's own expectation
    assert line.scores["red"].standard_error == pytest.approx(expected, rel=0.15)
    assert line.scores["green"].mean == pytest.approx(60)
    # Answers 1, 1, 1, 2 over the two seeds of a conditioning: three of six pairs differ.
    assert line.scores["diversity"].mean == pytest.approx(50)
    assert line.by_prompt == {"P1": pytest.approx(50)}
    (read,) = csv.DictReader(io.StringIO(summary.csv_table([line])))
    assert float(read["red"]) == pytest.approx(by_character.mean(), abs=1e-4)
    assert read["diversity P1"] == "50.0000" and read["characters"] == "held-out"
    assert "60.00" in summary.markdown([line]) and "held-out" in summary.markdown([line])


def test_the_frontier_puts_methods_where_their_scores_are():
    def line(method, weight, similarity, text):
        scores = {"red": Estimate(similarity, 1.0, 5), "green": Estimate(text, 1.0, 5)}
        return summary.Line(method, weight, "held-out", 10, scores, {})

    image = plot([line("one", 1.0, 20, 20), line("two", 1.0, 80, 80)], Pixels())
    pixels = np.asarray(image)

    def centre(colour):
        rows, columns = np.nonzero((pixels[70:] == colour).all(-1))
        assert len(rows)
        return np.median(rows), np.median(columns)

    (low, left), (high, right) = centre((230, 61, 61)), centre((51, 122, 235))
    assert low > high + 100 and right > left + 100
    curve = plot([line("one", w, 20 + 30 * w, 80 - 20 * w) for w in (0.0, 1.0, 2.0)], Pixels())
    assert (np.asarray(curve)[70:] == (230, 61, 61)).all(-1).sum() > 300
    assert isinstance(plot([], Pixels()), Image.Image)


def test_pictures_of_different_methods_do_not_fall_together():
    (run, *_) = SMALL.runs(["a"])
    names = {picture_name(name, 1.0, run, 0) for name in ("a b", "a-b", "a/b", "../a")}
    assert len(names) == 4 and all(".." not in name for name in names)


@pytest.mark.parametrize("kind", ["trained", "training-free"])
def test_weight_zero_is_the_base_model_and_noise_is_shared(untrained, kind):
    bundle = bundles.load_bundle(untrained)
    protocol = replace(SMALL, prompts=PAPERDOLL, samples=2)
    characters = {c.name: c for c in dolls()}

    def made(how):
        if kind == "trained":
            return TrainedMethod(bundle, (0.0, 1.0), how)
        return TrainingFreeMethod(bundle.base, (0.0, 1.0), how)

    method = made(Sampling(steps=1))
    assert method.name == kind
    runs = list(protocol.runs(list(characters)))[:2]
    plain, found = (method.draw(runs, characters, weight) for weight in (0.0, 1.0))
    assert [p.shape for p in plain] == [(2, 3, 64, 64)] * 2
    assert not torch.equal(plain[0], found[0])
    noise = torch.cat([method.noise(runs[0].seed, sample) for sample in range(2)])
    expected = generate(bundle, [runs[0].prompt] * 2, noise, None, Sampling(steps=1))
    torch.testing.assert_close(plain[0], expected, atol=1e-4, rtol=0)
    if kind == "trained":
        references = characters[runs[0].character].references
        tokens = gathered(bundle.base, bundle.network, references)
        how = Sampling(steps=1, strength=1.0)
        expected = generate(
            bundle, [runs[0].prompt] * 2, noise, retrieval_of(bundle.network, tokens, how), how
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
        (["--characters", "/nowhere"], "--no-core"),
        (["--report", "--characters", "/nowhere"], "0 folders"),
        (["--weights", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_arguments_get_one_sentence(tmp_path, capsys, arguments, words):
    assert command.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_a_folder_of_characters(tmp_path):
    for domain, name in (("in_domain", "ann"), ("in_domain", "bob"), ("held_out", "eve")):
        inner = tmp_path / domain / name
        inner.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 60), (10 * number, 200, 30)).save(inner / f"{number}.png")
    found = from_folder(tmp_path, SMALL)
    assert [c.name for c in found] == ["in_domain_ann", "in_domain_bob", "held_out_eve"]
    assert found[0].references[1].image.shape == (3, 512, 512)
    message = sentence(from_folder, tmp_path, replace(SMALL, references=3))
    assert "2 pictures" in message
    assert "2 folders" in sentence(from_folder, tmp_path, replace(SMALL, in_domain=3))


def test_model_scores_are_cosines_with_references_and_prompt():
    class Encoder:
        def embed_images(self, images):
            return images.mean((2, 3))

        def embed_texts(self, texts):
            return torch.tensor([[1.0, 0.0, 0.0]] * len(texts))

    character = dolls()[0]
    pictures = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    scorer = ModelScorer(Encoder(), dino=Encoder(), names=["tiny"])
    (run, *_) = SMALL.runs([character.name])
    scores, answers = scorer.score(run, character, pictures)
    means = torch.nn.functional.normalize(pictures.mean((2, 3)).double(), dim=1)
    theirs = torch.stack([r.image.mean((1, 2)) for r in character.references]).double()
    theirs = torch.nn.functional.normalize(theirs, dim=1)
    assert scores["CLIP-I"] == pytest.approx((100 * means @ theirs.T).mean(1).tolist(), abs=1e-4)
    assert scores["CLIP-T"] == pytest.approx((100 * means[:, 0]).tolist(), abs=1e-4)
    assert scores["DINO-I"] == scores["CLIP-I"] and answers == {}
    assert scorer.diversity(answers, scores["CLIP-I"]) is None


def test_the_judge_refuses_pictures_of_another_size():
    (run, *_) = SMALL.runs(["a"])
    message = sentence(PaperdollScorer(Judge()).score, run, dolls()[0], torch.zeros(1, 3, 128, 64))
    assert "64 x 128" in message


def test_an_empty_folder_is_made_only_for_results(tmp_path):
    ledger = Ledger(tmp_path / "deep" / "results", {"a": 1})
    ledger.append([])
    assert Ledger(tmp_path / "deep" / "results", {"a": 1}).rows == []
    assert "a 1" in sentence(Ledger, tmp_path / "deep" / "results", {"a": 2})


def test_the_frontiers_axes_hold_their_values_and_end_at_100_percent():
    low, high, step = _axis([Estimate(14.2, 2.8, 3), Estimate(94.0, 3.1, 3)])
    assert low <= 11.4 and high == 100 and (high - low) % step == 0
    low, high, _ = _axis([Estimate(30.0, 1.0, 3), Estimate(40.0, 1.0, 3)])
    assert low < 29 and 41 < high < 50
