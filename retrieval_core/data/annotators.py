"""Annotators by pretrained models in the format of transformers.

Any model of the kinds below will do; these have weights as safetensors and a clear licence:

    head box   IDEA-Research/grounding-dino-tiny, google/owlv2-base-patch16-ensemble (Apache-2.0)
    mask       one of these for the figure's box, and facebook/sam-vit-base (Apache-2.0)
    parts      CIDAS/clipseg-rd64-refined (Apache-2.0)
    answer     Salesforce/instructblip-flan-t5-xl, Salesforce/blip-vqa-base (MIT, BSD-3-Clause),
               or a chat model as in `metrics.vqa_models`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..errors import RetrievalError
from ..files import read_metadata
from ..hub import Progress
from ..metrics.model_folder import find_model
from ..metrics.pretrained import (
    choose_device,
    load_model,
    load_part,
    move_inputs,
    read_config,
)
from ..metrics.vqa_models import VQAModel, load_vqa
from .annotating import Annotator, Picture
from .outfits import QUESTION
from .placing import Placement, Region, place_picture, place_region
from .prepare import pad_to_square
from .sample import NEUTRAL, Box, clip_box

HEAD, FIGURE = "a head", "a person"
# What a part number in a data set's `parts` shows, from 1; 0 is everything else.
PARTS = ("hair", "face", "upper body clothes", "lower body clothes", "shoes")
# model_type -> lowest score of a box, transformers' own default.
DETECTORS = {"grounding-dino": 0.25, "owlv2": 0.1}
BATCH = 8
# Sides in pixels of the padded square that detectors and VQA models are shown: pictures of any
# shape in a batch, and a result that does not depend on the others in it.
DETECTED, ASKED = 800, 512
MAX_NEW_TOKENS = 32


def load_annotators(
    detector: str | None = None,
    segmenter: str | None = None,
    parts: str | None = None,
    vqa: str | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Annotator]:
    """Annotators by the models named: a folder, or a name on the hub (see `find_model`).

    Args:
        detector: finds head boxes, and figures for the segmenter. segmenter: SAM, for masks.
        parts: CLIPSeg. vqa: answers `QUESTION`.
        progress: of fetching a model, see `find_model`.

    Raises:
        RetrievalError: a model that cannot be found or is of another kind, or a segmenter without
            a detector.
    """
    if segmenter and not detector:
        raise RetrievalError(
            f"The segmenter '{segmenter}' needs the box of each figure; name a detector too, such "
            "as IDEA-Research/grounding-dino-tiny."
        )
    annotators: list[Annotator] = []
    if detector:
        folder = find_model(detector, progress)
        annotators.append(HeadDetector(folder))
        if segmenter:
            annotators.append(FigureSegmenter(folder, find_model(segmenter, progress)))
    if parts:
        annotators.append(PartSegmenter(find_model(parts, progress)))
    if vqa:
        annotators.append(ClothesAnswerer(find_model(vqa, progress)))
    return annotators


class Pretrained:
    """A model and its processor in a folder, loaded when first used, on the GPU if there is one.

    Raises:
        RetrievalError: the folder holds another kind than `kinds` (model_type -> its class).
    """

    def __init__(self, folder: Path, kinds: dict[str, str], use: str) -> None:
        self.kind = read_config(folder)["model_type"]
        if self.kind not in kinds:
            raise RetrievalError(
                f"The model in '{folder}' is of the kind '{self.kind}' and finds no {use}; use one "
                f"of {', '.join(kinds)}."
            )
        self.folder, self._class = folder, kinds[self.kind]

    @cached_property
    def processor(self) -> Any:
        return load_part("AutoProcessor", self.folder)

    @cached_property
    def model(self) -> Any:
        return load_model(self._class, self.folder, choose_device())


class BoxDetector:
    """Grounding DINO or OWLv2: the box of what a text names."""

    def __init__(self, folder: Path, text: str) -> None:
        kinds = dict.fromkeys(DETECTORS, "AutoModelForZeroShotObjectDetection")
        self._pretrained, self._text = Pretrained(folder, kinds, "boxes"), text
        self.fingerprint = f"{text}: {fingerprint_model(folder)}"

    @torch.no_grad()
    def find_boxes(self, pictures: Sequence[Picture]) -> list[Box | None]:
        """The best-scored box of each picture in its pixels, or None where none scores enough."""
        model, processor = self._pretrained.model, self._pretrained.processor
        boxes: list[Box | None] = []
        for some in _split(pictures):
            placed = [_place(picture) for picture in some]
            squares = [
                Image.fromarray(place_picture(picture.image, placement, NEUTRAL))
                for picture, placement in zip(some, placed)
            ]
            texts = [[self._text]] * len(some)
            inputs = processor(images=squares, text=texts, return_tensors="pt", padding=True)
            found = processor.image_processor.post_process_object_detection(
                model(**move_inputs(inputs, model)),
                threshold=DETECTORS[self._pretrained.kind],
                target_sizes=[(DETECTED, DETECTED)] * len(some),
            )
            boxes += [_choose_box(one, placement) for one, placement in zip(found, placed)]
        return boxes


class HeadDetector:
    """Annotator of head boxes by Grounding DINO or OWLv2.

    Raises:
        RetrievalError: the folder holds another model.
    """

    kind = "head_box"

    def __init__(self, folder: Path) -> None:
        self._detector = BoxDetector(folder, HEAD)
        self.fingerprint = self._detector.fingerprint

    def annotate(self, pictures: list[Picture]) -> list[Box | None]:
        return self._detector.find_boxes(pictures)


class FigureSegmenter:
    """Annotator of figure masks: SAM in the box of the figure, which a detector finds.

    Raises:
        RetrievalError: a folder holds another model.
    """

    kind = "mask"

    def __init__(self, detector: Path, folder: Path) -> None:
        self._detector = BoxDetector(detector, FIGURE)
        self._pretrained = Pretrained(folder, {"sam": "SamModel"}, "masks")
        self.fingerprint = f"{self._detector.fingerprint} {fingerprint_model(folder)}"

    def annotate(self, pictures: list[Picture]) -> list[np.ndarray | None]:
        boxes = self._detector.find_boxes(pictures)
        known = [(picture, box) for picture, box in zip(pictures, boxes) if box is not None]
        masks = iter(
            [mask for some in _split(known) for mask in self._segment(some)]  # in order of `known`
        )
        return [None if box is None else next(masks) for box in boxes]

    @torch.no_grad()
    def _segment(self, boxed: Sequence[tuple[Picture, Box]]) -> list[np.ndarray | None]:
        model, processor = self._pretrained.model, self._pretrained.processor
        inputs = processor(
            [Image.fromarray(picture.image) for picture, _ in boxed],
            input_boxes=[[list(map(float, box))] for _, box in boxed],
            return_tensors="pt",
        )
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        outputs = model(**move_inputs(inputs, model), multimask_output=False)
        masks = processor.image_processor.post_process_masks(outputs.pred_masks.cpu(), *sizes)
        found = [mask[0, 0].numpy() for mask in masks]
        return [mask if mask.any() else None for mask in found]


class PartSegmenter:
    """Annotator of `PARTS` by CLIPSeg, within the figure's mask where it is known.

    Raises:
        RetrievalError: the folder holds another model.
    """

    kind = "parts"

    def __init__(self, folder: Path) -> None:
        kinds = {"clipseg": "CLIPSegForImageSegmentation"}
        self._pretrained = Pretrained(folder, kinds, "parts")
        self.fingerprint = f"{', '.join(PARTS)}: {fingerprint_model(folder)}"

    @torch.no_grad()
    def annotate(self, pictures: list[Picture]) -> list[np.ndarray]:
        model, processor = self._pretrained.model, self._pretrained.processor
        labels = []
        for picture in pictures:
            images = [Image.fromarray(picture.image)] * len(PARTS)
            inputs = processor.image_processor(images=images, return_tensors="pt")
            inputs.update(processor.tokenizer(list(PARTS), padding=True, return_tensors="pt"))
            logits = model(**move_inputs(inputs, model)).logits.float()
            size = picture.image.shape[:2]
            logits = F.interpolate(logits[:, None], size, mode="bilinear")[:, 0]
            score, part = logits.max(0)
            found = torch.where(score > 0, part + 1, 0).to("cpu", torch.uint8).numpy()
            labels.append(found if picture.mask is None else found * picture.mask)
        return labels


class ClothesAnswerer:
    """Annotator of answers to `QUESTION` by a VQA model, see `metrics.vqa_models.load_vqa`."""

    kind = "answer"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.fingerprint = f"{QUESTION}: {fingerprint_model(folder)}"

    @cached_property
    def _vqa(self) -> VQAModel:
        return load_vqa(self._folder, MAX_NEW_TOKENS, device=choose_device())

    def annotate(self, pictures: list[Picture]) -> list[str]:
        squares = [pad_to_square(picture.image, None, ASKED)[0] for picture in pictures]
        images = torch.from_numpy(np.stack(squares)).movedim(-1, 1).float() / 255
        return self._vqa.answer(images, QUESTION)


def fingerprint_model(folder: Path) -> str:
    """A hash over a model's configuration and the first values of each of its weights.

    Not of all values: that would take longer than finding out that all results are cached.

    Raises:
        RetrievalError: a damaged file of weights.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt", ".model", ".jinja"):
            digest.update(f"{path.name}: ".encode() + path.read_bytes())
        if path.suffix == ".safetensors":
            read_metadata(path)  # that it is one, and whole
            digest.update(f"{path.name}: ".encode())
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = file.read(length)
                digest.update(header)
                tensors = json.loads(header)
                tensors.pop("__metadata__", None)
                for name in sorted(tensors):
                    start, stop = tensors[name]["data_offsets"]
                    file.seek(8 + length + start)
                    digest.update(file.read(min(stop - start, 1024)))
    return digest.hexdigest()


def _split(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def _place(picture: Picture) -> Placement:
    height, width = picture.image.shape[:2]
    return place_region(Region((0, 0, width, height)), DETECTED)


def _choose_box(found: dict[str, Any], placement: Placement) -> Box | None:
    """The box with the best score in whole pixels of the picture, clipped to it."""
    if not len(found["scores"]):
        return None
    edges = found["boxes"][found["scores"].argmax()].tolist()
    x0, y0, x1, y1 = (
        round(edge / placement.zoom + start) for edge, start in zip(edges, placement.origin * 2)
    )
    return clip_box((x0, y0, x1, y1), *placement.content[2:])
