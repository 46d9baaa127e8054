"""What VQA Diversity Score does: ask with one model, give it up, compare with another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.metrics import ImageScore, VQADiversity, ask, score_answers
from ...retrieval_core.paperdoll.judge_scores import JudgeAnswerer, WordEmbedder
from . import model_folders, scoring

AUTOMATIC = "automatic"
WORDS = "words (no model)"


class Comparison:
    """What the answers are compared with.

    Args:
        choice: `AUTOMATIC`, `WORDS` or a folder's name. repository: of the hub, counts before it.
        clip: the graph's CLIP, or None. judged: whether the paper-doll judge answers.

    Raises:
        RetrievalError: nothing is connected, chosen or named.
    """

    def __init__(self, choice: str, repository: str, clip: Any, judged: bool) -> None:
        self.choice, self.repository, self.clip = choice, repository.strip(), clip
        self.words = self.connected = False
        if not self.repository:
            self.connected = choice == AUTOMATIC and clip is not None
            self.words = choice == WORDS or (choice == AUTOMATIC and clip is None and judged)
            if choice == AUTOMATIC and not (self.connected or self.words):
                raise RetrievalError(
                    "There is nothing to compare the answers with; connect the CLIP of an SD or "
                    "SDXL checkpoint, or choose or name an answer encoder."
                )

    @property
    def name(self) -> str:
        if self.words:
            return "their words"
        return "the connected CLIP" if self.connected else (self.repository or self.choice)

    def folder(self) -> Path | None:
        """Of the CLIP model that was chosen or named; fetched if need be."""
        if self.words or self.connected:
            return None
        return model_folders.find(model_folders.CLIP, self.choice, self.repository)

    def score(
        self,
        answers: Mapping[str, tuple[str, ...]],
        similarity: ImageScore | None,
        folder: Path | None,
    ) -> VQADiversity:
        values = None if similarity is None else similarity.values
        if folder is None:
            encoder = WordEmbedder() if self.words else scoring.HostTextEncoder(self.clip)
            return score_answers(answers, encoder, values)
        from ...retrieval_core.metrics.encoders import load_clip

        clip = load_clip(folder)
        with scoring.loaded(clip.model):
            return score_answers(answers, scoring.WatchedEncoder(clip), values)


def questions_in(text: str) -> list[str]:
    """The questions of a text, one a line.

    Raises:
        RetrievalError: there is none.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise RetrievalError(
            "There is no question for the VQA model; write at least one, each on a line of its own."
        )
    return lines


def check_similarity(similarity: ImageScore | None, count: int) -> None:
    """Refuses, before a model is asked for an hour, what could not be weighted by."""
    if similarity is not None and len(similarity.values) != count:
        raise RetrievalError(
            f"There are {count} images and {len(similarity.values)} similarities to weight them "
            "by; score the same batch in both nodes."
        )


def answers_of(
    images: Tensor, questions: list[str], folder: Path | None, most_tokens: int, batch: int
) -> dict[str, tuple[str, ...]]:
    """question -> an answer an image, by the model in a folder, or the paper-doll judge if None.

    Raises:
        RetrievalError: see `ask`, or a folder that holds no such model.
    """
    if folder is None:
        return ask(images, questions, JudgeAnswerer(scoring.judge()))
    from ...retrieval_core.metrics.vqa_models import load_vqa

    vqa = load_vqa(folder, most_tokens, batch, dtype=scoring.half_type())
    with scoring.loaded(vqa.model):
        return ask(images, questions, scoring.WatchedAnswerer(vqa, len(set(questions))))
