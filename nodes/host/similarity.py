"""What the similarity nodes do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.metrics import ImageScore, image_similarity, text_similarity
from ...retrieval_core.paperdoll.judge import FACE, GARMENTS, truth
from ...retrieval_core.paperdoll.judge_scores import attribute_match
from ...retrieval_core.paperdoll.world import Figure, random_scene
from ..score_nodes import CONNECTED, NAMED
from . import model_folders, scoring


def image_scores(
    images: Any, references: Any, dino: bool, encoder: str, repository: str, clip_vision: Any
) -> ImageScore:
    """CLIP-I or DINO-I of images [N, H, W, C] to references [M, h, w, C].

    Raises:
        RetrievalError: no encoder, one of the other kind, or see `image_similarity`.
    """
    pictures = scoring.pictures(images), scoring.pictures(references, "reference")
    if encoder == CONNECTED and not repository.strip():
        host_encoder = _connected(clip_vision, dino)
        return image_similarity(*pictures, scoring.WatchedEncoder(host_encoder))
    from ...retrieval_core.metrics.encoders import load_clip, load_dino

    kind = model_folders.DINO if dino else model_folders.CLIP
    model = (load_dino if dino else load_clip)(model_folders.find(kind, encoder, repository))
    with scoring.loaded(model.model):
        return image_similarity(*pictures, scoring.WatchedEncoder(model))


def _connected(clip_vision: Any, dino: bool) -> scoring.HostImageEncoder:
    name = "DINO" if dino else "CLIP"
    if clip_vision is None:
        raise RetrievalError(
            f"There is no encoder to compare images by; connect a CLIP_VISION, or choose or name a "
            f"{name} model."
        )
    encoder = scoring.HostImageEncoder(clip_vision)
    if encoder.is_dino != dino:
        found = "DINOv2" if encoder.is_dino else "not a DINOv2"
        raise RetrievalError(
            f"The CLIP_VISION given is {found} and {name}-I was asked for; connect a {name} model, "
            "or choose the other measure."
        )
    return encoder


def text_scores(images: Any, prompts: Sequence[str], encoder: str, repository: str) -> ImageScore:
    """CLIP-T of images [N, H, W, C] to one prompt, or one each.

    Raises:
        RetrievalError: no CLIP model, or see `text_similarity`.
    """
    pictures = scoring.pictures(images)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise RetrievalError(
            "The prompt to compare with is empty; write the text that the images should follow."
        )
    if encoder == NAMED and not repository.strip():
        raise RetrievalError(
            "There is no CLIP to compare image and text by; choose a folder, or name a repository "
            "such as openai/clip-vit-large-patch14."
        )
    from ...retrieval_core.metrics.encoders import load_clip

    model = load_clip(model_folders.find(model_folders.CLIP, encoder, repository))
    with scoring.loaded(model.model):
        return text_similarity(pictures, prompts, scoring.WatchedEncoder(model))


def match_scores(images: Any, character: int, wearer: int, face: bool, clothes: bool) -> ImageScore:
    """Share of the attributes of `character`'s face and `wearer`'s clothes in each figure.

    Args:
        images: [N, 64, 64, C]. character, wearer: numbers of Paper-Doll Reference.

    Raises:
        RetrievalError: see `scoring.figures`.
    """
    from .paperdoll_host import character_of

    who, _ = character_of(np.random.default_rng([character, 30]))
    _, outfit = character_of(np.random.default_rng([wearer, 30]))
    wanted = truth(Figure(who, outfit, random_scene(np.random.default_rng(0))))
    attributes = (*(FACE if face else ()), *(GARMENTS if clothes else ()))
    readings = scoring.judge().read(scoring.figures(images))
    return attribute_match(readings, [wanted], attributes)
