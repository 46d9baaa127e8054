"""The VQA diversity score (§5.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..errors import RetrievalError
from .diversity import diversity, weighted_diversity
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


@dataclass(frozen=True, eq=False)
class VQADiversity:
    """All questions, and the mean of their scores.

    embeddings: [N, Q D], an image's embeddings for all Q questions concatenated, scaled so that
    the cosine distance of two rows is the mean of the questions' distances.
    """

    questions: tuple[QuestionResult, ...]
    score: Estimate
    weighted: Estimate | None
    embeddings: np.ndarray


def ask(images: Tensor, questions: Sequence[str], answerer: Answerer) -> dict[str, tuple[str, ...]]:
    """question -> one answer per image [N, 3, H, W], stripped; a repeated question is asked once.

    Raises:
        RetrievalError: an empty answer.
    """
    answers: dict[str, tuple[str, ...]] = {}
    for question in dict.fromkeys(questions):
        given = tuple(answer.strip() for answer in answerer.answer(images, question))
        empty = given.count("")
        if empty:
            raise RetrievalError(
                f"The VQA model answered nothing to {question!r} for {empty} of {len(images)} "
                "images; ask in other words, or use another model."
            )
        answers[question] = given
    return answers


def score_answers(
    answers: Mapping[str, Sequence[str]],
    embedder: TextEmbedder,
    similarity: Sequence[float] | np.ndarray | None = None,
) -> VQADiversity:
    """The VQA diversity of images made from one conditioning, from the answers that `ask` returns.

    The answers are embedded and their pairwise cosine distances averaged, in percent. The average
    of Table 4 is the mean of the scores of several conditionings.

    Args:
        answers: two or more per question.
        similarity: [N] in percent (`ImageScore.values`): also gives the weighted score.

    Raises:
        RetrievalError: an embedding without direction.
    """
    results = []
    for question, given in answers.items():
        # A model's output for one text may differ in the last bits between batches.
        distinct = list(dict.fromkeys(given))
        rows = {answer: row for row, answer in enumerate(distinct)}
        embedded = normalise(embedder.embed_texts(distinct))[[rows[answer] for answer in given]]
        scores = _score(embedded, similarity)
        results.append(QuestionResult(question, tuple(given), *scores, embedded))
    joint = np.concatenate([r.embeddings for r in results], 1) / np.sqrt(len(results))
    return VQADiversity(tuple(results), *_score(joint, similarity), joint)


def _score(
    embeddings: np.ndarray, similarity: Sequence[float] | np.ndarray | None
) -> tuple[Estimate, Estimate | None]:
    weighted = None if similarity is None else weighted_diversity(embeddings, similarity)
    return diversity(embeddings), weighted
