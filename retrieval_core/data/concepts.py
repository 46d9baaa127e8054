"""Cutting a figure, a face or clothes out of a picture (§3.3)."""

from __future__ import annotations

import numpy as np

from ..errors import RetrievalError
from .augment import UNCHANGED, View, recolour
from .placing import (
    Region,
    mask_box,
    place_mask,
    place_parts,
    place_picture,
    place_region,
)
from .sample import NEUTRAL, Box, Colour, Concept, Reference, Sample

# §3.3 takes the head box's lower border beyond a share of the image's height as the sign of a
# figure upside down or lying, or of too little left below; the number is lost in the text at
# hand, and this one is ours.
LOWEST_HEAD_BORDER = 0.75


def find_figure_region(sample: Sample) -> Region:
    """The whole picture."""
    height, width = sample.image.shape[:2]
    return Region((0, 0, width, height))


def find_face_region(sample: Sample) -> Region:
    """The head box, its shorter side grown to the longer as far as the picture reaches.

    Raises RetrievalError for a sample without a head box.
    """
    height, width = sample.image.shape[:2]
    x0, y0, x1, y1 = _head_box(sample)
    side = max(x1 - x0, y1 - y0)
    left, right = _grown(x0, x1, side, width)
    top, bottom = _grown(y0, y1, side, height)
    return Region((left, top, right, bottom))


def find_clothes_region(sample: Sample) -> Region:
    """The picture below the head box; where that leaves too little, all but the head box.

    Raises RetrievalError for a sample without a head box.
    """
    height, width = sample.image.shape[:2]
    box = _head_box(sample)
    if box[3] > LOWEST_HEAD_BORDER * height or box[3] >= height:
        return Region((0, 0, width, height), blank=box)
    return Region((0, box[3], width, height))


_REGIONS = {"figure": find_figure_region, "face": find_face_region, "clothes": find_clothes_region}


def cut_reference(
    sample: Sample,
    concept: Concept,
    size: int,
    fill: Colour = NEUTRAL,
    *,
    remove_background: bool = False,
    view: View = UNCHANGED,
    colour: np.ndarray | None = None,
) -> Reference:
    """Cut `concept` out of a sample as a reference of `size` x `size` pixels.

    fill: colour of padding, removed background and blanked head. remove_background: fill
    outside the sample's mask, so that the reference's mask is the figure; without it, or where
    the sample has no mask or the part shows nothing of it, the mask is all but the padding.
    view, colour: augmentation, see `augment.py`.

    Raises RetrievalError for an unknown concept, or without a head box where one is needed.
    """
    if concept not in _REGIONS:
        raise RetrievalError(
            f"The concept is {concept!r}; it must be one of {', '.join(_REGIONS)}."
        )
    region = _REGIONS[concept](sample)
    placement = place_region(region, size, view)
    image = recolour(sample.image, colour)
    mask = sample.mask if remove_background else None
    if mask is not None and region.blank is not None:
        mask = _blanked(mask, region.blank, False)
    if mask is not None and not _part(mask, region.content).any():
        mask = None
    if mask is not None:
        image = np.where(mask[..., None], image, np.array(fill, np.uint8))
    elif region.blank is not None:
        image = _blanked(image, region.blank, fill)
    square = place_picture(image, placement, fill)
    if mask is not None:
        mask = place_mask(mask, placement)
        if not mask.any():  # thinner than half a pixel, or out of this view
            mask = None
    if mask is None and placement.inside != (0, 0, size, size):
        mask = mask_box(placement.mirrored(placement.inside), size)
    parts = sample.parts
    if parts is not None:
        if region.blank is not None:
            parts = _blanked(parts, region.blank, 0)
        parts = place_parts(parts, placement)
    return Reference(square, mask, concept, parts)


def figure_reference(sample: Sample, size: int, fill: Colour = NEUTRAL, **options) -> Reference:
    """The whole picture as a reference; options as in `cut_reference`."""
    return cut_reference(sample, "figure", size, fill, **options)


def face_reference(sample: Sample, size: int, fill: Colour = NEUTRAL, **options) -> Reference:
    """The head box, filling the square; options as in `cut_reference`."""
    return cut_reference(sample, "face", size, fill, **options)


def clothes_reference(sample: Sample, size: int, fill: Colour = NEUTRAL, **options) -> Reference:
    """What is below the head, or all but the head; options as in `cut_reference`."""
    return cut_reference(sample, "clothes", size, fill, **options)


def _head_box(sample: Sample) -> Box:
    if sample.head_box is None:
        raise RetrievalError(
            "A face or clothes reference needs the head box, and this sample has none; "
            "annotate it or use the concept figure."
        )
    return sample.head_box


def _grown(low: int, high: int, side: int, limit: int) -> tuple[int, int]:
    """`low` .. `high` grown evenly to `side`, pushed back into 0 .. `limit` where it can be."""
    start = low - (side - (high - low)) // 2
    start = max(0, min(start, limit - side))
    return start, min(start + side, limit)


def _part(pixels: np.ndarray, box: Box) -> np.ndarray:
    return pixels[box[1] : box[3], box[0] : box[2]]


def _blanked(pixels: np.ndarray, box: Box, value: Colour | bool | int) -> np.ndarray:
    pixels = pixels.copy()
    _part(pixels, box)[:] = value
    return pixels
