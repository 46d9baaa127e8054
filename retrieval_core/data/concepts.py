"""Cutting a figure, a face or clothes out of a picture (§3.3)."""

from __future__ import annotations

import numpy as np

from ..errors import RetrievalError
from .augment import UNCHANGED, View
from .placing import Region, mask_box, place_mask, place_parts, place_picture, place_region
from .sample import NEUTRAL, Box, Colour, Concept, Reference, Sample

# §3.3: a head box whose lower border lies beyond this share of the image's height belongs to a
# figure that lies or stands on its head, or leaves too little below. The paper's number is lost in
# the text at hand; this one is ours.
LOWEST_HEAD_BORDER = 0.75


def find_figure_region(sample: Sample) -> Region:
    """The whole picture."""
    height, width = sample.image.shape[:2]
    return Region((0, 0, width, height))


def find_face_region(sample: Sample) -> Region:
    """The head box, its shorter side extended to the longer as far as the picture reaches.

    Raises RetrievalError for a sample without a head box.
    """
    height, width = sample.image.shape[:2]
    x0, y0, x1, y1 = _require_head_box(sample)
    side = max(x1 - x0, y1 - y0)
    left, right = _extend(x0, x1, side, width)
    top, bottom = _extend(y0, y1, side, height)
    return Region((left, top, right, bottom))


def find_clothes_region(sample: Sample) -> Region:
    """The picture below the head box, or all but the head box if too little is below.

    Raises RetrievalError for a sample without a head box.
    """
    height, width = sample.image.shape[:2]
    box = _require_head_box(sample)
    if box[3] > LOWEST_HEAD_BORDER * height:
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
) -> Reference:
    """Cuts `concept` out of a sample as a reference of `size` x `size` pixels.

    fill: colour of padding, removed background and blanked head. remove_background: fill the
    picture outside the sample's mask, so that the reference's mask is the figure. Otherwise, or if
    the sample has no mask or the region shows nothing of it, the mask is all but the padding.
    view: augmentation.

    Raises RetrievalError for an unknown concept, or if the concept needs a missing head box.
    """
    if concept not in _REGIONS:
        raise RetrievalError(
            f"The concept is {concept!r}; it must be one of {', '.join(_REGIONS)}."
        )
    region = _REGIONS[concept](sample)
    placement = place_region(region, size, view)
    image, parts = sample.image, sample.parts
    mask = sample.mask if remove_background else None
    if region.blank is not None:
        image = _fill_box(image, region.blank, fill)
        mask = None if mask is None else _fill_box(mask, region.blank, False)
        parts = None if parts is None else _fill_box(parts, region.blank, 0)
    if mask is not None and not _crop(mask, region.content).any():
        mask = None
    if mask is not None:
        image = np.where(mask[..., None], image, np.array(fill, np.uint8))
        mask = place_mask(mask, placement)
        if not mask.any():  # thinner than half a pixel, or outside this view
            mask = None
    if mask is None and placement.inside != (0, 0, size, size):
        mask = mask_box(placement.mirror(placement.inside), size)
    square = place_picture(image, placement, fill)
    return Reference(
        square, mask, concept, None if parts is None else place_parts(parts, placement)
    )


def _require_head_box(sample: Sample) -> Box:
    if sample.head_box is None:
        raise RetrievalError(
            "A face or clothes reference needs the head box, and this sample has none; "
            "annotate it or use the concept figure."
        )
    return sample.head_box


def _extend(low: int, high: int, side: int, limit: int) -> tuple[int, int]:
    """`low` .. `high` extended evenly to `side`, moved and then clipped into 0 .. `limit`."""
    start = low - (side - (high - low)) // 2
    start = max(0, min(start, limit - side))
    return start, min(start + side, limit)


def _crop(pixels: np.ndarray, box: Box) -> np.ndarray:
    return pixels[box[1] : box[3], box[0] : box[2]]


def _fill_box(pixels: np.ndarray, box: Box, value: Colour | bool | int) -> np.ndarray:
    pixels = pixels.copy()
    _crop(pixels, box)[:] = value
    return pixels
