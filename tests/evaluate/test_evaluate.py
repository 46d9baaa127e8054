"""The evaluation: its protocol, resuming, and the table's arithmetic."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from refusal import sentence

from retrieval_core.data.prepare import PreparedReference
from retrieval_core.evaluate import summary
from retrieval_core.evaluate.characters import Character, read_characters
from retrieval_core.evaluate.evaluation import Evaluation, name_picture
from retrieval_core.evaluate.frontier import draw_frontier, write_frontier
from retrieval_core.evaluate.ledger import Ledger
from retrieval_core.evaluate.protocol import RETRIBOORU, Protocol
from retrieval_core.evaluate.scores import ModelScorer
from retrieval_core.metrics.statistics import Estimate

SMALL = Protocol(2, 1, 2, ("first", "second"), 2, 3, seed=5)


class Scripted:
    """A method whose pictures tell character, weight and sample by their colour."""

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
        from retrieval_core.metrics.vqa import score_answers

        class OneHot:
            def embed_texts(self, texts):
                return torch.eye(16)[[int(text) for text in texts]]

        return score_answers(answers, OneHot(), similarity)


def people(protocol: Protocol = SMALL) -> list[Character]:
    generator = torch.Generator().manual_seed(protocol.seed)

    def person(name, domain):
        images = torch.rand(protocol.references, 3, 64, 64, generator=generator)
        return Character(name, domain, [PreparedReference(image, None) for image in images])

    inside = [person(f"in_domain_{i}", "in-domain") for i in range(protocol.in_domain)]
    return inside + [person(f"held_out_{i}", "held-out") for i in range(protocol.held_out)]


def evaluated(folder, methods, protocol=SMALL, characters=None):
    evaluation = Evaluation(folder, protocol, characters or people(protocol), Pixels())
    for method in methods:
        for weight in method.weights:
            evaluation.run(method, weight)
    evaluation.report()
    return evaluation


def test_the_defaults_are_the_papers():
    paper = Protocol()
    names = [str(i) for i in range(paper.in_domain + paper.held_out)]
    assert sum(run.samples for run in paper.runs(names)) == 5000
    assert (Protocol().held_out, Protocol().in_domain, Protocol().references) == (10, 40, 4)
    assert [len(prompt.split(", ")) for prompt in RETRIBOORU] == [15, 17, 27, 17, 35]


def test_every_run_is_there_once():
    runs = list(SMALL.runs(["a", "b"]))
    assert len(runs) == 8 == len({run.key for run in runs})
    assert {run.seed for run in runs} == {5, 6}
    assert {(run.prompt_name, run.prompt) for run in runs} == {("P1", "first"), ("P2", "second")}


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
    changed = people()
    changed[1].references[0].image[0, 3, 5] += 0.1
    message = sentence(evaluated, tmp_path, [], characters=changed)
    assert "references of in_domain_1" in message
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
    expected = np.std(by_character, ddof=1) / np.sqrt(3)
    assert line.scores["red"].standard_error == pytest.approx(expected)
    assert line.scores["green"].mean == pytest.approx(60)
    # Answers 1, 1, 1, 2 over the two seeds of a conditioning: three of six pairs differ.
    assert line.scores["diversity"].mean == pytest.approx(50)
    assert line.by_prompt == {"P1": pytest.approx(50)}
    (read,) = csv.DictReader(io.StringIO(summary.write_csv([line])))
    assert float(read["red"]) == pytest.approx(by_character.mean(), abs=1e-4)
    assert read["diversity P1"] == "50.0000" and read["characters"] == "held-out"
    assert "60.00" in summary.write_markdown([line]) and "held-out" in summary.write_markdown(
        [line]
    )


def make_line(method, weight, similarity, text, domain="held-out", error=1.0):
    scores = {"red": Estimate(similarity, error, 5), "green": Estimate(text, error, 5)}
    return summary.Line(method, weight, domain, 10, scores, {})


def test_the_frontier_puts_methods_where_their_scores_are():
    lines = [make_line("one", w, 20 + 30 * w, 80 - 20 * w) for w in (0.0, 1.0, 2.0)]
    lines += [make_line("two", None, 45, 35), make_line("two", None, 50, 90, "in-domain")]
    left, right = draw_frontier(lines, Pixels()).axes
    assert (left.get_title(), right.get_title()) == ("in-domain characters", "held-out characters")
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    assert (right.get_xlabel(), right.get_ylabel()) == ("green, %", "red, %")
    one, two = right.containers
    assert (one.get_label(), two.get_label()) == ("one", "two")
    assert one.lines[0].get_xydata().tolist() == [[80, 20], [60, 50], [40, 80]]
    assert two.lines[0].get_xydata().tolist() == [[35, 45]]
    across, up = (bars.get_segments() for bars in two.lines[2])
    assert across[0].tolist() == [[34, 45], [36, 45]] and up[0].tolist() == [[35, 44], [35, 46]]
    assert [text.get_text() for text in right.texts] == ["no retrieval", "1", "2"]
    (alone,) = left.containers  # in the colour that the method has in the other panel
    assert alone.lines[0].get_color() == two.lines[0].get_color() != one.lines[0].get_color()


def test_the_frontier_is_the_same_file_for_the_same_lines(tmp_path):
    one = [make_line("one", 1.0, 20, 20), make_line("one", 2.0, 30, 10, error=float("nan"))]
    for name, lines in (("a", one), ("b", one), ("c", one[:1]), ("d", [])):
        write_frontier(tmp_path / name, lines, Pixels())
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG" and image.height > 400 and "Software" not in image.info
    same, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert same == again != other


def test_pictures_of_different_methods_do_not_fall_together():
    (run, *_) = SMALL.runs(["a"])
    names = {name_picture(name, 1.0, run, 0) for name in ("a b", "a-b", "a/b", "../a")}
    assert len(names) == 4 and all(".." not in name for name in names)


def test_a_folder_of_characters(tmp_path):
    for domain, name in (("in_domain", "ann"), ("in_domain", "bob"), ("held_out", "eve")):
        inner = tmp_path / domain / name
        inner.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 60), (10 * number, 200, 30)).save(inner / f"{number}.png")
    found = read_characters(tmp_path, SMALL)
    assert [c.name for c in found] == ["in_domain_ann", "in_domain_bob", "held_out_eve"]
    assert found[0].references[1].image.shape == (3, 512, 512)
    message = sentence(read_characters, tmp_path, replace(SMALL, references=3))
    assert "2 pictures" in message
    assert "2 folders" in sentence(read_characters, tmp_path, replace(SMALL, in_domain=3))


def test_model_scores_are_cosines_with_references_and_prompt():
    class Encoder:
        embedded = 0

        def embed_images(self, images):
            self.embedded += len(images)
            return images.mean((2, 3))

        def embed_texts(self, texts):
            return torch.tensor([[1.0, 0.0, 0.0]] * len(texts))

    character = people()[0]
    pictures = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    clip = Encoder()
    scorer = ModelScorer(clip, Encoder(), None, ["tiny"])
    (run, *_) = SMALL.runs([character.name])
    scores, answers = scorer.score(run, character, pictures)
    means = torch.nn.functional.normalize(pictures.mean((2, 3)).double(), dim=1)
    theirs = torch.stack([r.image.mean((1, 2)) for r in character.references]).double()
    theirs = torch.nn.functional.normalize(theirs, dim=1)
    assert scores["CLIP-I"] == pytest.approx((100 * means @ theirs.T).mean(1).tolist(), abs=1e-4)
    assert scores["CLIP-T"] == pytest.approx((100 * means[:, 0]).tolist(), abs=1e-4)
    assert scores["DINO-I"] == scores["CLIP-I"] and answers == {}
    assert scorer.diversity(answers, scores["CLIP-I"]) is None
    before = clip.embedded
    assert scorer.score(run, character, pictures)[0] == scores
    assert clip.embedded == before + 2 * len(pictures)  # the references only once


def test_an_empty_folder_is_made_only_for_results(tmp_path):
    ledger = Ledger(tmp_path / "deep" / "results", {"a": 1})
    ledger.append([])
    assert Ledger(tmp_path / "deep" / "results", {"a": 1}).rows == []
    assert "a 1" in sentence(Ledger, tmp_path / "deep" / "results", {"a": 2})
