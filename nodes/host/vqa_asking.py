"""VQA Diversity Score: asks questions with one model, unloads it, then compares the answers with
another."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.metrics.diversity import find_extreme_pairs
from ...retrieval_core.metrics.diversity_report import plot_distances, write_report
from ...retrieval_core.metrics.encoders import load_clip
from ...retrieval_core.metrics.protocols import TextEmbedder
from ...retrieval_core.metrics.similarity import ImageScore
from ...retrieval_core.metrics.vqa import ask, score_answers
from ...retrieval_core.metrics.vqa_models import BATCH, MAX_NEW_TOKENS, load_vqa
from ...retrieval_core.metrics.word_embedder import WordEmbedder
from . import model_folders
from .scoring import (
    HostTextEncoder,
    WatchedAnswerer,
    choose_half,
    convert_images,
    load_encoder,
    load_model,
)

JUDGE = "paper-doll judge (bundled)"
AUTOMATIC = "automatic"
WORDS = "words (no model)"


def score_diversity(
    images: Tensor,
    vqa_model: str,
    questions: str,
    vqa_repository: str = "",
    answer_encoder: str = AUTOMATIC,
    encoder_repository: str = "",
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH,
    clip: Any = None,
    similarity: ImageScore | None = None,
) -> tuple[float, str, Tensor, Tensor, Tensor, float]:
    """The outputs of the node: score, report, plot, the pairs most and least alike, and the
    weighted score. The arguments are the node's inputs.

    Raises:
        RetrievalError: no question, another number of similarities than of images, nothing to
            compare the answers with, a model that is missing or of another kind, or see `ask`.
    """
    vqa_repository = vqa_repository.strip()
    judged = vqa_model == JUDGE and not vqa_repository
    if judged:
        from .paperdoll_scores import convert_figures, make_answerer

        batch = convert_figures(images, least=2)
    else:
        batch = convert_images(images, least=2)
    asked = [line.strip() for line in questions.splitlines() if line.strip()]
    if not asked:
        raise RetrievalError(
            "There is no question for the VQA model; write at least one, each on a line of its own."
        )
    if similarity is not None and len(similarity.values) != len(batch):
        raise RetrievalError(
            f"There are {len(batch)} images and {len(similarity.values)} similarities to weight "
            "them by; score the same batch in both nodes."
        )
    # Both models are downloaded before the first runs.
    compared_by, encoder = _choose_encoder(answer_encoder, encoder_repository.strip(), clip, judged)
    if judged:
        name, answers = "the paper-doll judge", ask(batch, asked, make_answerer())
    else:
        name = vqa_repository or vqa_model
        folder = model_folders.find_folder(model_folders.VQA, vqa_model, vqa_repository)
        vqa = load_vqa(folder, max_new_tokens, batch_size, dtype=choose_half())
        with load_model(vqa.model):
            answers = ask(batch, asked, WatchedAnswerer(vqa, len(set(asked))))
    with encoder as embedder:
        result = score_answers(answers, embedder, None if similarity is None else similarity.values)
    alike, different = (
        batch[[pair.first, pair.second]].movedim(1, -1).contiguous()
        for pair in find_extreme_pairs(result.embeddings)
    )
    return (
        result.score.mean,
        f"{write_report(result)}\n\nAnswers by {name}, compared by {compared_by}.",
        torch.from_numpy(plot_distances(result))[None],
        alike,
        different,
        float("nan") if result.weighted is None else result.weighted.mean,
    )


def _choose_encoder(
    choice: str, repository: str, clip: Any, judged: bool
) -> tuple[str, AbstractContextManager[TextEmbedder]]:
    """The name and the context of the encoder of answers: a CLIP model, which is fetched if need
    be and loaded in the context, the connected CLIP, or the answers' words.
    """
    if repository or choice not in (AUTOMATIC, WORDS):
        folder = model_folders.find_folder(model_folders.CLIP, choice, repository)
        return repository or choice, load_encoder(load_clip, folder)
    if choice == AUTOMATIC and clip is not None:
        return "the connected CLIP", nullcontext(HostTextEncoder(clip))
    if choice == WORDS or judged:
        return "their words", nullcontext(WordEmbedder())
    raise RetrievalError(
        "There is nothing to compare the answers with; connect the CLIP of an SD or SDXL "
        "checkpoint, or choose or name an answer encoder."
    )
