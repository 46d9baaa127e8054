"""What is read off the pictures: the judge's attributes, or CLIP's and DINO's likeness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ..errors import RetrievalError
from ..metrics import (
    DEFAULT_QUESTIONS,
    Answerer,
    TextEmbedder,
    VQADiversity,
    ask,
    image_similarity,
    score_answers,
    text_similarity,
)
from ..metrics.word_embedder import WordEmbedder
from ..network.fingerprint import fingerprint_weights
from ..paperdoll.judge import Judge
from ..paperdoll.judge_scores import attribute_match, describe
from ..paperdoll.world import BACKGROUNDS, EXPRESSIONS, POSES, SIZE
from .characters import Character
from .protocol import Run

_SAID = {"pose": POSES, "expression": EXPRESSIONS, "background": BACKGROUNDS}


class Scorer(Protocol):
    """Scores in percent, one a picture.

    Attributes:
        similarity, text: the names of the two scores that are the axes of the frontier.
        digest: what must be the same for scores to be compared.
    """

    similarity: str
    text: str
    digest: dict[str, Any]

    def score(
        self, run: Run, character: Character, pictures: Tensor
    ) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
        """Scores by name, and answers by question ({} where nobody answers)."""
        ...

    def diversity(
        self, answers: Mapping[str, Sequence[str]], similarity: Sequence[float]
    ) -> VQADiversity | None:
        """Of all pictures of one character and prompt."""
        ...


class PaperdollScorer:
    """The judge reads the attributes; the truth about references and prompt is known."""

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
        readings = self.judge.read(pictures)
        said = said_by(run.prompt)
        scores = {
            self.similarity: attribute_match(readings, [character.wanted]).values.tolist(),
            "reference background": [
                100.0 * (r["background"] == character.background) for r in readings
            ],
        }
        if said:
            scores[self.text] = [
                100 * float(np.mean([r[name] == value for name, value in said.items()]))
                for r in readings
            ]
        answers = {q: [describe(r, q) for r in readings] for q in DEFAULT_QUESTIONS}
        return scores, answers

    def diversity(
        self, answers: Mapping[str, Sequence[str]], similarity: Sequence[float]
    ) -> VQADiversity | None:
        return score_answers(answers, self._embedder, similarity)


def said_by(prompt: str) -> dict[str, str]:
    """The attributes that a paper-doll prompt names."""
    tags = [" ".join(tag.lower().replace("_", " ").split()) for tag in prompt.split(",")]
    return {name: tag for name, values in _SAID.items() for tag in tags if tag in values}


class ModelScorer:
    """CLIP-I, CLIP-T and, with a DINO, DINO-I; diversity where there is a VQA model.

    Args:
        clip: an encoder of images and texts into one space. dino: of images.
        names: of the models, which must be the same for scores to be compared.
    """

    similarity, text = "CLIP-I", "CLIP-T"

    def __init__(
        self,
        clip: Any,
        dino: Any = None,
        vqa: Answerer | None = None,
        names: Sequence[str] = (),
        embedder: TextEmbedder | None = None,
    ):
        self.clip, self.dino, self.vqa = clip, dino, vqa
        self.embedder = embedder or clip
        self.digest = {"scores": list(names)}

    def score(
        self, run: Run, character: Character, pictures: Tensor
    ) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
        references = [reference.image for reference in character.references]
        scores = {
            self.similarity: image_similarity(pictures, references, self.clip).values.tolist(),
            self.text: text_similarity(pictures, run.prompt, self.clip).values.tolist(),
        }
        if self.dino is not None:
            scores["DINO-I"] = image_similarity(pictures, references, self.dino).values.tolist()
        answers: dict[str, list[str]] = {}
        if self.vqa is not None:
            # One at a time is enough here: a pair is only needed when all are compared.
            doubled = pictures if len(pictures) > 1 else pictures.repeat(2, 1, 1, 1)
            asked = ask(doubled, DEFAULT_QUESTIONS, self.vqa)
            answers = {q: list(a[: len(pictures)]) for q, a in asked.items()}
        return scores, answers

    def diversity(
        self, answers: Mapping[str, Sequence[str]], similarity: Sequence[float]
    ) -> VQADiversity | None:
        return score_answers(answers, self.embedder, similarity) if answers else None
