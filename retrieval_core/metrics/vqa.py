"""The VQA diversity score (§5.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RetrievalError
from .diversity import Pair, diversity, find_extreme_pairs, weighted_diversity
from .images import Images, check_batch
from .protocols import Answerer, TextEmbedder
from .similarity import normalise
from .statistics import Estimate

# An overall description, and one question for each aspect that is to stay free (§5.5).
DEFAULT_QUESTIONS = (
    "Describe the image in detail.",
    "Describe the pose of the character.",
    "Describe the background of the image.",
    "Describe the expression on the character's face.",
)


@dataclass(frozen=True, eq=False)
class QuestionResult:
    """One question: the answers in the images' order, and their diversity in percent.

    weighted: `weighted_diversity`, None where no similarity was given. embeddings: [N, D] of the
    answers, at length one; equal answers have equal rows.
    """

    question: str
    answers: tuple[str, ...]
    score: Estimate
    weighted: Estimate | None
    embeddings: np.ndarray

    def extremes(self) -> tuple[Pair, Pair]:
        """The most and the least alike pair of images by this question's answers."""
        return find_extreme_pairs(self.embeddings)


@dataclass(frozen=True, eq=False)
class VQADiversity:
    """All questions, and the mean of their scores.

    embeddings: [N, Q D]: an image's answers side by side, scaled so that the cosine distance of
    two rows is the mean of the questions' distances.
    """

    questions: tuple[QuestionResult, ...]
    score: Estimate
    weighted: Estimate | None
    embeddings: np.ndarray

    def extremes(self) -> tuple[Pair, Pair]:
        """The most and the least alike pair of images by the mean distance of their answers."""
        return find_extreme_pairs(self.embeddings)


def vqa_diversity(
    images: Images,
    questions: str | Sequence[str],
    answerer: Answerer,
    embedder: TextEmbedder,
    similarity: Sequence[float] | np.ndarray | None = None,
) -> VQADiversity:
    """The VQA diversity score of images [N, 3, H, W] made from one conditioning (§5.5).

    Each image is asked each question; the answers are embedded, and the pairwise cosine distances
    averaged, in percent. Several conditionings are scored one by one, then `bootstrap` of their
    scores gives the average of Table 4. It is `ask` and `score_answers`, which callers use apart
    where the two models do not fit into memory together.

    Args:
        questions: one or more.
        similarity: [N] in percent (`ImageScore.values`): also gives the weighted score.

    Raises:
        RetrievalError: see `ask` and `score_answers`.
    """
    return score_answers(ask(images, questions, answerer), embedder, similarity)


def ask(
    images: Images, questions: str | Sequence[str], answerer: Answerer
) -> dict[str, tuple[str, ...]]:
    """question -> one answer an image, spaces stripped; a question asked twice counts once.

    Raises:
        RetrievalError: fewer than two images, different sizes, no or an empty question, an answer
            that is missing or empty.
    """
    batch = check_batch(images, least=2)
    asked = [questions] if isinstance(questions, str) else list(questions)
    if not asked or not all(question.strip() for question in asked):
        raise RetrievalError(
            "A question to the VQA model is empty; write at least one question, each on a line of "
            "its own."
        )
    answers: dict[str, tuple[str, ...]] = {}
    for question in asked:
        if question not in answers:
            answers[question] = tuple(a.strip() for a in answerer.answer(batch, question))
            _check_answers(answers[question], question, len(batch))
    return answers


def score_answers(
    answers: Mapping[str, Sequence[str]],
    embedder: TextEmbedder,
    similarity: Sequence[float] | np.ndarray | None = None,
) -> VQADiversity:
    """The scores of answers, as `ask` gives them.

    Raises:
        RetrievalError: an embedding without direction, or another number of similarities.
    """
    results = []
    for question, given in answers.items():
        # Once each: a model's output for one text may differ in the last bits between batches.
        distinct = list(dict.fromkeys(given))
        place = {answer: i for i, answer in enumerate(distinct)}
        embedded = normalise(embedder.embed_texts(distinct))[[place[a] for a in given]]
        scores = _scores(embedded, similarity)
        results.append(QuestionResult(question, tuple(given), *scores, embedded))
    joint = np.concatenate([r.embeddings for r in results], 1) / np.sqrt(len(results))
    return VQADiversity(tuple(results), *_scores(joint, similarity), joint)


def _scores(
    embeddings: np.ndarray, similarity: Sequence[float] | np.ndarray | None
) -> tuple[Estimate, Estimate | None]:
    weighted = None if similarity is None else weighted_diversity(embeddings, similarity)
    return diversity(embeddings), weighted


def _check_answers(answers: Sequence[str], question: str, count: int) -> None:
    if len(answers) != count:
        raise RetrievalError(
            f"The VQA model gave {len(answers)} answers to {question!r} for {count} images; use "
            "another model."
        )
    empty = sum(not answer for answer in answers)
    if empty:
        raise RetrievalError(
            f"The VQA model answered nothing to {question!r} for {empty} of {count} images; ask "
            "in other words, or use another model."
        )
