"""Scores of generated images (§5.3 to §5.5): similarity, text following, diversity of answers.

Every score is in percent (100 times a cosine, as in Tables 3 and 4) and every mean comes as an
`Estimate` with a bootstrap standard error. Images are [N, 3, H, W] in 0..1. Models enter through
three protocols, so that a VQA model or a known truth can answer:
`Answerer`, `TextEmbedder`, `ImageEmbedder`. transformers is imported only by what loads its models.

    clip_t = text_similarity(images, prompts, clip)          # ImageScore: values [N], estimate
    clip_i = image_similarity(images, references, clip)      # the same with DINO is DINO-I
    vqa = vqa_diversity(images, DEFAULT_QUESTIONS, answerer, clip, similarity=clip_i.values)
    vqa.score, vqa.weighted                                  # Estimates

In the modules: `vqa_models.load_vqa`, `encoders.load_clip` and `encoders.load_dino` read models in
the format of transformers, and `model_folder.find_model` finds or fetches one by name.
"""

from .diversity import (
    Pair,
    compute_distance_matrix,
    diversity,
    find_extreme_pairs,
    weighted_diversity,
)
from .protocols import Answerer, ImageEmbedder, TextEmbedder
from .similarity import (
    ImageScore,
    embed_images,
    image_similarity,
    similarity,
    text_similarity,
)
from .statistics import Estimate, bootstrap
from .vqa import (
    DEFAULT_QUESTIONS,
    QuestionResult,
    VQADiversity,
    ask,
    score_answers,
    vqa_diversity,
)

__all__ = [
    "DEFAULT_QUESTIONS",
    "Answerer",
    "Estimate",
    "ImageEmbedder",
    "ImageScore",
    "Pair",
    "QuestionResult",
    "TextEmbedder",
    "VQADiversity",
    "ask",
    "bootstrap",
    "compute_distance_matrix",
    "diversity",
    "embed_images",
    "find_extreme_pairs",
    "image_similarity",
    "score_answers",
    "similarity",
    "text_similarity",
    "vqa_diversity",
    "weighted_diversity",
]
