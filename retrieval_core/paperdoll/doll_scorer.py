"""Scores of an evaluation on paper dolls: the judge's attributes against the known truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from ..errors import RetrievalError
from ..evaluate.characters import Character
from ..evaluate.protocol import Run
from ..metrics.vqa import DEFAULT_QUESTIONS, VQADiversity, score_answers
from ..metrics.word_embedder import WordEmbedder
from ..network.fingerprint import fingerprint_weights
from .judge import ATTRIBUTES, SCENE, Judge
from .judge_scores import describe, match_attributes
from .text import split_tags
from .world import SIZE


class PaperdollScorer:
    """A `Scorer` that compares the judge's attributes with those of references and prompt."""

    similarity, text = "attribute match", "text match"

    def __init__(self, judge: Judge):
        self.judge = judge
        self.digest = {"scores": f"paper-doll judge {fingerprint_weights(judge.state_dict())[:16]}"}
        self._embedder = WordEmbedder()

    def score(
        self, run: Run, character: Character, pictures: Tensor
    ) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
        if pictures.shape[-2:] != (SIZE, SIZE):
            height, width = pictures.shape[-2:]
            raise RetrievalError(
                f"The pictures are {width} x {height} pixels and the judge reads paper dolls of "
                f"{SIZE} x {SIZE}; save them unscaled, or evaluate a folder of characters."
            )
        found = self.judge.read(pictures)
        said = parse_prompt(run.prompt)
        scores = {
            self.similarity: match_attributes(found, character.truth).values.tolist(),
            "reference background": [
                100.0 * (f["background"] == character.truth["background"]) for f in found
            ],
        }
        if said:
            scores[self.text] = [
                100 * float(np.mean([f[name] == value for name, value in said.items()]))
                for f in found
            ]
        answers = {q: [describe(f, q) for f in found] for q in DEFAULT_QUESTIONS}
        return scores, answers

    def diversity(
        self, answers: Mapping[str, Sequence[str]], similarity: Sequence[float]
    ) -> VQADiversity | None:
        return score_answers(answers, self._embedder, similarity)


def parse_prompt(prompt: str) -> dict[str, str]:
    """The attributes that a paper-doll prompt names."""
    tags = split_tags(prompt)
    return {name: tag for name in SCENE for tag in tags if tag in ATTRIBUTES[name]}
