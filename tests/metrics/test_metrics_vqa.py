"""The VQA diversity score: questions, averages, errors, report and plot."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from refusal import sentence

from retrieval_core.metrics.diversity import find_extreme_pairs
from retrieval_core.metrics.diversity_report import MOST_SHOWN, plot_distances, write_report
from retrieval_core.metrics.statistics import estimate_mean
from retrieval_core.metrics.vqa import DEFAULT_QUESTIONS, ask, score_answers

ANSWERS = {
    "pose?": ["she sits", "she sits", "he waves", "she jumps"],
    "place?": ["beach", "beach", "beach", "city"],
}


class Scripted:
    """Answers from a table; records the questions."""

    def __init__(self, answers=ANSWERS):
        self.answers, self.asked = answers, []

    def answer(self, images, question):
        self.asked.append(question)
        return list(self.answers[question])


class Letters:
    """Counts of letters, with noise in the last bits that depends on the batch, as models have."""

    def embed_texts(self, texts):
        rows = [[text.count(c) + 0.1 for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts]
        return torch.tensor(rows) * (1 + 1e-6 * torch.rand(len(texts), 26))


def images(count=4, size=8):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def plain(answers) -> float:
    """The mean pairwise cosine distance in percent, written out."""
    rows = [[text.count(c) + 0.1 for c in "abcdefghijklmnopqrstuvwxyz"] for text in answers]
    found = []
    for i in range(len(rows)):
        for j in range(i):
            product = math.fsum(a * b for a, b in zip(rows[i], rows[j]))
            lengths = math.hypot(*rows[i]) * math.hypot(*rows[j])
            found.append(100 * (1 - product / lengths))
    return math.fsum(found) / len(found)


def test_the_score_is_the_mean_of_the_questions():
    answerer = Scripted()
    result = score_answers(ask(images(), list(ANSWERS), answerer), Letters())
    assert answerer.asked == list(ANSWERS)
    for question in result.questions:
        assert question.answers == tuple(ANSWERS[question.question])
        assert question.score.mean == pytest.approx(plain(question.answers), abs=1e-3)
    both = np.mean([plain(answers) for answers in ANSWERS.values()])
    assert result.score.mean == pytest.approx(both, abs=1e-3)
    assert result.score.count == 4 and result.score.standard_error > 0
    assert result.weighted is None
    most, least = find_extreme_pairs(result.embeddings)
    assert (most.first, most.second, most.distance) == (0, 1, 0)
    assert 3 in (least.first, least.second)


def test_weighting_takes_the_images_similarities():
    result = score_answers(ANSWERS, Letters(), [100, 100, 100, 0])
    without = plain(ANSWERS["pose?"][:3]) * 3 / 6  # the pairs of the last image count nothing
    assert result.questions[0].weighted.mean == pytest.approx(without, abs=1e-3)
    assert result.weighted.mean == pytest.approx(without / 2, abs=1e-3)
    assert result.weighted.mean < result.score.mean


def test_identical_answers_score_nothing_in_any_batch():
    answers = {"pose?": [" she sits", "she sits ", "she sits"]}
    result = score_answers(ask(images(3), ["pose?"], Scripted(answers)), Letters())
    assert result.score.mean == 0 and result.questions[0].answers == ("she sits",) * 3


def test_the_order_of_the_images_does_not_matter():
    class Fixed:
        def embed_texts(self, texts):
            return torch.tensor([[text.count(c) + 0.1 for c in "aeshbc"] for text in texts])

    turned = {question: answers[::-1] for question, answers in ANSWERS.items()}
    a = score_answers(ANSWERS, Fixed(), [10, 20, 30, 40])
    b = score_answers(turned, Fixed(), [40, 30, 20, 10])
    assert a.score == b.score and a.weighted == b.weighted


def test_table_4_averages_over_conditionings():
    scores = [score_answers({"q": a}, Letters()).score.mean for a in ANSWERS.values()]
    found = estimate_mean(scores)
    assert found.mean == pytest.approx(np.mean(scores)) and found.count == 2


def test_the_defaults_ask_for_all_and_for_what_stays_free():
    assert len(DEFAULT_QUESTIONS) == 4
    for word, question in zip(("describe", "pose", "background", "expression"), DEFAULT_QUESTIONS):
        assert word in question.lower()


def test_a_question_asked_twice_counts_once():
    answerer = Scripted()
    assert list(ask(images(), ["pose?", "pose?"], answerer)) == ["pose?"]
    assert answerer.asked == ["pose?"]


def test_bad_input():
    silent = Scripted({"pose?": ["sits", "", "  ", "jumps"]})
    message = sentence(ask, images(), ["pose?"], silent)
    assert "answered nothing to 'pose?' for 2 of 4 images" in message


def test_the_report_says_it_all():
    result = score_answers(ANSWERS, Letters(), [90, 80, 70, 60])
    text = write_report(result)
    assert str(result.score) in text and str(result.weighted) in text
    for question, answers in ANSWERS.items():
        assert question in text
        for number, answer in enumerate(answers, 1):
            assert f"\n{number}: {answer}" in text
    assert "most alike: images 1 and 2 (0.00 %)" in text


def test_the_plot_shows_the_distances():
    result = score_answers(ANSWERS, Letters())
    plot = plot_distances(result)
    assert plot.dtype == np.float32 and plot.ndim == 3 and plot.shape[2] == 3
    assert 0 <= plot.min() and plot.max() <= 1
    dark, light = np.array((68, 1, 84)) / 255, np.array((253, 231, 37)) / 255
    # The diagonal is dark, so its first and last pixels are the corners of the 4 x 4 matrix.
    rows, columns = np.nonzero((abs(plot - dark) < 0.01).all(-1))
    top, left, side = rows.min(), columns.min(), rows.max() - rows.min()

    def colour(i, j):
        return plot[top + int((i + 0.5) * side / 4), left + int((j + 0.5) * side / 4)]

    _, least = find_extreme_pairs(result.embeddings)
    for i in range(4):
        np.testing.assert_allclose(colour(i, i), dark, atol=0.01)
    np.testing.assert_allclose(colour(0, 1), dark, atol=0.01)
    np.testing.assert_allclose(colour(least.first, least.second), light, atol=0.01)
    np.testing.assert_allclose(colour(least.second, least.first), light, atol=0.01)
    assert (plot == (1, 0, 0)).all(-1).any()  # the frame of the least alike pair
    np.testing.assert_array_equal(plot_distances(result), plot)


def test_a_plot_of_very_many_shows_the_first():
    rows = [f"{'ab'[i % 2]} {'x' * (i % 7)}" for i in range(MOST_SHOWN + 50)]
    plot = plot_distances(score_answers({"q": rows}, Letters()))
    assert np.isfinite(plot).all() and not (plot == (1, 0, 0)).all(-1).any()


def test_equal_answers_can_be_plotted():
    assert np.isfinite(plot_distances(score_answers({"q": ["she sits"] * 3}, Letters()))).all()
