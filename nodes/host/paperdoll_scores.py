"""Scores and answers by the bundled paper-doll judge."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.metrics.similarity import ImageScore
from ...retrieval_core.paperdoll.bundle import JUDGE_FILE, find_bundled
from ...retrieval_core.paperdoll.judge import FACE, GARMENTS, Judge, list_truth, load_judge
from ...retrieval_core.paperdoll.judge_scores import JudgeAnswerer, match_attributes
from ...retrieval_core.paperdoll.world import SIZE, Figure, random_scene
from .paperdoll_host import draw_character
from .scoring import convert_images


def load_bundled_judge() -> Judge:
    """Loads the bundled judge, some 2 MB."""
    return load_judge(find_bundled(JUDGE_FILE)).eval()


def make_answerer() -> JudgeAnswerer:
    """The judge as an answerer of questions."""
    return JudgeAnswerer(load_bundled_judge())


def convert_figures(images: Any, least: int = 1) -> Tensor:
    """`convert_images` of the paper-doll model's size.

    Raises:
        RetrievalError: see `convert_images`, or another size.
    """
    found = convert_images(images, least=least)
    height, width = found.shape[-2:]
    if (height, width) != (SIZE, SIZE):
        raise RetrievalError(
            f"The images are {width} x {height} pixels and the paper-doll judge reads figures of "
            f"{SIZE} x {SIZE}; give pictures of the paper-doll model before they are enlarged, or "
            "choose a VQA model."
        )
    return found


def score_matches(
    images: Any, character: int, wearer: int, face: bool, clothes: bool
) -> ImageScore:
    """Share of the attributes of `character`'s face and `wearer`'s clothes in each figure.

    Args:
        images: [N, 64, 64, C]. character, wearer: numbers of Paper-Doll Reference.

    Raises:
        RetrievalError: see `convert_figures`.
    """
    who, _ = draw_character(np.random.default_rng([character, 30]))
    _, outfit = draw_character(np.random.default_rng([wearer, 30]))
    wanted = list_truth(Figure(who, outfit, random_scene(np.random.default_rng(0))))
    attributes = (*(FACE if face else ()), *(GARMENTS if clothes else ()))
    found = load_bundled_judge().read(convert_figures(images))
    return match_attributes(found, wanted, attributes)
