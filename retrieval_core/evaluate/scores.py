"""Scores of the pictures: CLIP's and DINO's similarity, and answers of a VQA model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ..metrics.protocols import Answerer, ImageEmbedder
from ..metrics.similarity import embed_references, similarity, text_similarity
from ..metrics.vqa import DEFAULT_QUESTIONS, VQADiversity, ask, score_answers
from .characters import Character
from .protocol import Run

# Scores by name, one per picture, and answers by question ({} without a VQA model).
Scored = tuple[dict[str, list[float]], dict[str, list[str]]]


class Scorer(Protocol):
    """Scores in percent, one per picture.

    Attributes:
        similarity, text: the names of the two scores that are the axes of the frontier.
        digest: must be the same for scores to be comparable.
    """

    similarity: str
    text: str
    digest: dict[str, Any]

    def score(self, run: Run, character: Character, pictures: Tensor) -> Scored: ...

    def diversity(
        self, answers: Mapping[str, Sequence[str]], similarity: Sequence[float]
    ) -> VQADiversity | None:
        """Diversity of all pictures of one character and prompt; None without answers."""
        ...


class ModelScorer:
    """CLIP-I, CLIP-T and, with a DINO, DINO-I; diversity where there is a VQA model.

    The references' embeddings are cached by the character's name for the scorer's lifetime.

    Args:
        clip: an encoder of images and texts into one space. dino: of images.
        names: of the models.
    """

    similarity, text = "CLIP-I", "CLIP-T"

    def __init__(self, clip: Any, dino: Any, vqa: Answerer | None, names: Sequence[str]):
        self.clip, self.dino, self.vqa = clip, dino, vqa
        self.digest = {"scores": list(names)}
        self._references: dict[tuple[str, str], np.ndarray] = {}

    def score(self, run: Run, character: Character, pictures: Tensor) -> Scored:
        scores = {
            self.similarity: self._compare(pictures, character, self.similarity, self.clip),
            self.text: text_similarity(pictures, run.prompt, self.clip).values.tolist(),
        }
        if self.dino is not None:
            scores["DINO-I"] = self._compare(pictures, character, "DINO-I", self.dino)
        answers: dict[str, list[str]] = {}
        if self.vqa is not None:
            asked = ask(pictures, DEFAULT_QUESTIONS, self.vqa)
            answers = {question: list(given) for question, given in asked.items()}
        return scores, answers

    def _compare(
        self, pictures: Tensor, character: Character, name: str, encoder: ImageEmbedder
    ) -> list[float]:
        key = character.name, name
        if key not in self._references:
            images = [reference.image for reference in character.references]
            self._references[key] = embed_references(images, encoder)
        return similarity(encoder.embed_images(pictures), self._references[key]).tolist()

    def diversity(
        self, answers: Mapping[str, Sequence[str]], similarity: Sequence[float]
    ) -> VQADiversity | None:
        return score_answers(answers, self.clip, similarity) if answers else None
