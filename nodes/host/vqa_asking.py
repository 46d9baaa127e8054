"""VQA Diversity Score: asks questions with one model, unloads it, then compares the answers with
another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.metrics import (
    ImageScore,
    VQADiversity,
    ask,
    find_extreme_pairs,
    score_answers,
)
from ...retrieval_core.metrics.diversity_report import plot_distances, write_report
from ...retrieval_core.metrics.word_embedder import WordEmbedder
from . import model_folders
from .scoring import (
    HostTextEncoder,
    WatchedAnswerer,
    WatchedEncoder,
    choose_half,
    convert_images,
    load_model,
)

AUTOMATIC = "automatic"
WORDS = "words (no model)"


class Comparison:
    """The encoder of answers: the connected CLIP, a CLIP model's folder, or their words.

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

    def find_folder(self) -> Path | None:
        """Of the CLIP model that was chosen or named; fetched if need be."""
        if self.words or self.connected:
            return None
        return model_folders.find_folder(model_folders.CLIP, self.choice, self.repository)

    def score(
        self,
        answers: Mapping[str, tuple[str, ...]],
        similarity: ImageScore | None,
        folder: Path | None,
    ) -> VQADiversity:
        values = None if similarity is None else similarity.values
        if folder is None:
            encoder = WordEmbedder() if self.words else HostTextEncoder(self.clip)
            return score_answers(answers, encoder, values)
        from ...retrieval_core.metrics.encoders import load_clip

        clip = load_clip(folder)
        with load_model(clip.model):
            return score_answers(answers, WatchedEncoder(clip), values)


def parse_questions(text: str) -> list[str]:
    """Parses the questions of a text, one a line.

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
    """Refuses similarities of another number of images, before the VQA model runs."""
    if similarity is not None and len(similarity.values) != count:
        raise RetrievalError(
            f"There are {count} images and {len(similarity.values)} similarities to weight them "
            "by; score the same batch in both nodes."
        )


def ask_questions(
    images: Tensor, questions: list[str], folder: Path | None, most_tokens: int, batch: int
) -> dict[str, tuple[str, ...]]:
    """question -> an answer an image, by the model in a folder, or the paper-doll judge if None.

    Raises:
        RetrievalError: see `ask`, or a folder that holds no such model.
    """
    if folder is None:
        from .paperdoll_scores import make_answerer

        return ask(images, questions, make_answerer())
    from ...retrieval_core.metrics.vqa_models import load_vqa

    vqa = load_vqa(folder, most_tokens, batch, dtype=choose_half())
    with load_model(vqa.model):
        return ask(images, questions, WatchedAnswerer(vqa, len(set(questions))))


def score_diversity(
    images: Any,
    vqa_model: str | None,
    questions: str,
    vqa_repository: str,
    answer_encoder: str,
    encoder_repository: str,
    max_new_tokens: int,
    batch_size: int,
    clip: Any,
    similarity: ImageScore | None,
) -> tuple[float, str, Tensor, Tensor, Tensor, float]:
    """The outputs of the node: score, report, plot, the pairs most and least alike, and the
    weighted score.

    Args:
        vqa_model: a folder's name; None for the paper-doll judge. The others: as the node's inputs.

    Raises:
        RetrievalError: what `ask_questions`, `Comparison` and `check_similarity` refuse.
    """
    judged = vqa_model is None
    if judged:
        from .paperdoll_scores import convert_figures as convert
    else:
        convert = convert_images
    batch, asked = convert(images, least=2), parse_questions(questions)
    check_similarity(similarity, len(batch))
    compared = Comparison(answer_encoder, encoder_repository, clip, judged)
    # Both are downloaded before the first runs.
    folder = None
    if vqa_model is not None:
        folder = model_folders.find_folder(model_folders.VQA, vqa_model, vqa_repository)
    encoder = compared.find_folder()
    answers = ask_questions(batch, asked, folder, max_new_tokens, batch_size)
    result = compared.score(answers, similarity, encoder)
    alike, different = (
        batch[[pair.first, pair.second]].movedim(1, -1).contiguous()
        for pair in find_extreme_pairs(result.embeddings)
    )
    name = "the paper-doll judge" if judged else vqa_repository.strip() or vqa_model
    return (
        result.score.mean,
        f"{write_report(result)}\n\nAnswers by {name}, compared by {compared.name}.",
        torch.from_numpy(plot_distances(result))[None],
        alike,
        different,
        float("nan") if result.weighted is None else result.weighted.mean,
    )
