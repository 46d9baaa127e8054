"""The score on a world whose truth is known: collapsed and leaking models are found out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from retrieval_core.metrics.vqa import DEFAULT_QUESTIONS, score_answers
from retrieval_core.metrics.word_embedder import WordEmbedder
from retrieval_core.paperdoll.judge import list_truth
from retrieval_core.paperdoll.judge_scores import JudgeAnswerer, describe, match_attributes
from retrieval_core.paperdoll.world import (
    BACKGROUNDS,
    Figure,
    random_identity,
    random_outfit,
    random_scene,
)

COUNT = 24


def drawn(seed=0, **fixed) -> list[Figure]:
    """What a model that varies freely draws of one character; `fixed` is what its prompt says."""
    rng = np.random.default_rng(seed)
    who, clothes = random_identity(rng, False), random_outfit(rng, False)
    return [Figure(who, clothes, replace(random_scene(rng), **fixed)) for _ in range(COUNT)]


def scored(figures, similarity=None):
    answers = {q: [describe(list_truth(f), q) for f in figures] for q in DEFAULT_QUESTIONS}
    return score_answers(answers, WordEmbedder(), similarity)


def of(result, word):
    """The score of the default question about `word`."""
    return next(q for q in result.questions if word in q.question)


def following(figures, **said) -> list[float]:
    """How well figures follow what a prompt said, in percent: the text match of the protocol."""
    return [
        100 * float(np.mean([list_truth(f)[name] == value for name, value in said.items()]))
        for f in figures
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_score_falls_with_the_share_of_collapse(seed):
    free = drawn(seed)
    scores = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        collapsed = round(share * COUNT)
        scores.append(scored([free[0]] * collapsed + free[collapsed:]).score.mean)
    assert all(a > b for a, b in zip(scores, scores[1:])), scores
    assert scores[0] > 10 and scores[-1] == 0


def test_a_copied_background_shows_in_its_question():
    free = drawn()
    leaking = [replace(f, scene=replace(f.scene, background="forest")) for f in free]
    honest, leaked = scored(free), scored(leaking)
    assert of(honest, "background").score.mean > 20 and of(leaked, "background").score.mean == 0
    for word in ("pose", "expression"):
        assert of(leaked, word).score == of(honest, word).score
    assert leaked.score.mean < honest.score.mean


def test_a_leak_that_looks_diverse_shows_in_the_weighted_score():
    """Backgrounds copied from different references vary more than the one that was asked for."""
    honest = drawn(background="beach")
    rng = np.random.default_rng(9)
    others = [b for b in BACKGROUNDS if b != "beach"]
    leaking = [
        replace(f, scene=replace(f.scene, background=others[rng.integers(len(others))]))
        for f in honest
    ]
    results = [scored(f, following(f, background="beach")) for f in (honest, leaking)]
    assert results[1].score.mean > results[0].score.mean  # the plain score is taken in
    assert of(results[1], "background").score.mean > of(results[0], "background").score.mean
    assert results[0].weighted.mean == pytest.approx(results[0].score.mean)
    assert results[1].weighted.mean == 0
    # A share of leaks is found out in proportion.
    weighted = []
    for count in (0, COUNT // 3, COUNT):
        some = leaking[:count] + honest[count:]
        weighted.append(scored(some, following(some, background="beach")).weighted.mean)
    assert weighted[0] > weighted[1] > weighted[2]


def test_answers_name_what_was_asked_for():
    truth = list_truth(drawn(background="night")[0])
    assert describe(truth, "Describe the background of the image.") == "the background is night"
    assert describe(truth, "Which pose?") == f"the pose is {truth['pose']}"
    both = describe(truth, "pose and eyes")
    assert both == f"the pose is {truth['pose']}, the eyes are {truth['eye colour']}"
    whole = describe(truth, DEFAULT_QUESTIONS[0])
    unsaid = {"skin", "upper pattern", "mirrored"}
    assert all(value in whole for name, value in truth.items() if name not in unsaid)


def test_the_judges_answers_describe_its_attributes():
    class Reader:
        def read(self, images):
            return [list_truth(figure) for figure in figures]

    figures = drawn()
    images = torch.zeros(COUNT, 3, 64, 64)
    answers = JudgeAnswerer(Reader()).answer(images, "pose")
    assert answers == [f"the pose is {figure.scene.pose}" for figure in figures]


def test_words_in_common_are_the_similarity():
    from retrieval_core.metrics.diversity import compute_distance_matrix

    texts = ["the pose is standing", "the pose is waving", "The pose, is STANDING!", "a b c d"]
    matrix = compute_distance_matrix(WordEmbedder().embed_texts(texts))
    assert matrix[0, 1] == pytest.approx(25) and matrix[0, 2] == 0
    assert matrix[0, 3] == pytest.approx(100)
    assert WordEmbedder().embed_texts(["...", "?"]).norm(dim=1).min() > 0


def test_attribute_match_is_the_share_of_attributes():
    a, b = list_truth(drawn(0)[0]), list_truth(drawn(5)[0])
    names = ("hair style", "hair colour", "eye colour", "upper", "upper colour", "lower",
             "lower colour")  # fmt: skip
    same = 100 * np.mean([a[name] == b[name] for name in names])
    found = match_attributes([a, b], a)
    assert found.values.tolist() == pytest.approx([100, same])
    assert found.estimate.mean == pytest.approx((100 + same) / 2) and found.estimate.count == 2
    assert match_attributes([b], a, ("skin",)).values == [100 * (a["skin"] == b["skin"])]
