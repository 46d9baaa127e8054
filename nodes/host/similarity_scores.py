"""CLIP-I, DINO-I and CLIP-T of IMAGEs, by a connected encoder or a model's folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy.image_encoders.dino2 import Dinov2Model
from comfy_api.latest import io, ui

from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.metrics.encoders import load_clip, load_dino
from ...retrieval_core.metrics.similarity import ImageScore, image_similarity, text_similarity
from . import model_folders
from .scoring import HostImageEncoder, WatchedEncoder, convert_images, load_encoder

CONNECTED = "connected CLIP_VISION"
NAMED = "named repository"


def score_images(
    images: Any,
    references: Any,
    dino: bool,
    encoder: str,
    repository: str = "",
    clip_vision: Any = None,
) -> ImageScore:
    """CLIP-I or DINO-I of images [N, H, W, C] to references [M, h, w, C].

    Raises:
        RetrievalError: no encoder, one of the other kind, or see `image_similarity`.
    """
    name = "DINO" if dino else "CLIP"
    pictures = convert_images(images), convert_images(references, "reference")
    if encoder == CONNECTED and not repository.strip():
        if clip_vision is None:
            raise RetrievalError(
                "There is no encoder to compare images by; connect a CLIP_VISION, or choose or "
                f"name a {name} model."
            )
        is_dino = isinstance(clip_vision.model, Dinov2Model)
        if is_dino != dino:
            raise RetrievalError(
                f"The CLIP_VISION given is {'' if is_dino else 'not '}a DINOv2 and {name}-I was "
                f"asked for; connect a {name} model, or choose the other measure."
            )
        return image_similarity(*pictures, WatchedEncoder(HostImageEncoder(clip_vision)))
    kind, load = (model_folders.DINO, load_dino) if dino else (model_folders.CLIP, load_clip)
    folder = model_folders.find_folder(kind, encoder, repository)
    with load_encoder(load, folder) as loaded:
        return image_similarity(*pictures, loaded)


def score_texts(images: Any, prompts: Sequence[str], encoder: str, repository: str) -> ImageScore:
    """CLIP-T of images [N, H, W, C] to one prompt, or one each.

    Raises:
        RetrievalError: no CLIP model, or see `text_similarity`.
    """
    pictures = convert_images(images)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise RetrievalError(
            "The prompt to compare with is empty; write the text that the images should follow."
        )
    if encoder == NAMED and not repository.strip():
        raise RetrievalError(
            "There is no CLIP to compare image and text by; choose a folder, or name a repository "
            "such as openai/clip-vit-large-patch14."
        )
    folder = model_folders.find_folder(model_folders.CLIP, encoder, repository)
    with load_encoder(load_clip, folder) as loaded:
        return text_similarity(pictures, prompts, loaded)


def give_score(title: str, score: ImageScore, against: str) -> io.NodeOutput:
    """The outputs of `socket_types.list_score_outputs`, with the report as text on the node."""
    count = len(score.values)
    error = "" if count > 1 else ", one image, so no standard error"
    lines = [f"{title}: {score.estimate} % ({count} images, {against}{error})"]
    lines += [f"{number}: {value:.2f} %" for number, value in enumerate(score.values, 1)]
    text = "\n".join(lines)
    return io.NodeOutput(score.estimate.mean, text, score, ui=ui.PreviewText(text))
