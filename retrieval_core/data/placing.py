"""Places a region of a picture on a square: padded, never squashed (§4.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .augment import UNCHANGED, View
from .sample import Box, Colour


@dataclass(frozen=True)
class Region:
    """A region of a picture: only pixels inside `content` are shown, all else is padding.

    content: box in whole pixels. The square shown is centred on it and has its longer side.
    blank: box to be filled with the padding colour, or None.
    """

    content: Box
    blank: Box | None = None


@dataclass(frozen=True)
class Placement:
    """The mapping of a region to a square of `size` pixels.

    origin, zoom: picture point p maps to (p - origin) * zoom, before mirroring.
    inside: box of the square's pixels that lie wholly in the content, before mirroring.
    """

    size: int
    origin: tuple[float, float]
    zoom: float
    inside: Box
    content: Box
    flip: bool

    def mirror(self, box: Box) -> Box:
        """A box of the square before mirroring as the box after it; unchanged without `flip`."""
        x0, y0, x1, y1 = box
        return (self.size - x1, y0, self.size - x0, y1) if self.flip else box

    def place_box(self, box: Box) -> Box:
        """Maps a box of the picture to the square, in whole pixels, clipped to `inside`."""
        (ox, oy), (x0, y0, x1, y1) = self.origin, self.inside
        left, right = ((edge - ox) * self.zoom for edge in (box[0], box[2]))
        top, bottom = ((edge - oy) * self.zoom for edge in (box[1], box[3]))
        left, right = max(round(left), x0), min(round(right), x1)
        top, bottom = max(round(top), y0), min(round(bottom), y1)
        return self.mirror((left, top, max(right, left), max(bottom, top)))


def place_region(region: Region, size: int, view: View = UNCHANGED) -> Placement:
    """Maps `region` to a square of `size` pixels under `view`.

    The view's shift is limited so that the square's centre stays on the content.
    """
    x0, y0, x1, y1 = region.content
    side = max(x1 - x0, y1 - y0)
    shown = side * view.scale
    origin, inside = [], []
    for low, high, shift in ((x0, x1, view.shift[0]), (y0, y1, view.shift[1])):
        centre = min(max((low + high) / 2 + shift * side, low), high)
        start = centre - shown / 2
        # Whole pixels only: a pixel that is partly padding would blend the padding in.
        first = max(0, math.ceil((low - start) * size / shown - 1e-6))
        last = min(size, math.floor((high - start) * size / shown + 1e-6))
        if last <= first:  # thinner than a pixel: still shown as a line
            first = min(max(0, math.floor((low - start) * size / shown)), size - 1)
            last = first + 1
        origin.append(start)
        inside.append((first, last))
    (left, right), (top, bottom) = inside
    box = (left, top, right, bottom)
    return Placement(size, (origin[0], origin[1]), size / shown, box, region.content, view.flip)


def place_picture(image: np.ndarray, placement: Placement, fill: Colour) -> np.ndarray:
    """uint8 [H, W, 3] -> [S, S, 3], Lanczos (area-aware when shrinking), padded with `fill`."""
    square = np.empty((placement.size, placement.size, 3), np.uint8)
    square[:] = fill
    return _resample(image, placement, square, Image.Resampling.LANCZOS)


def place_mask(mask: np.ndarray, placement: Placement) -> np.ndarray:
    """bool [H, W] -> [S, S]; True where at least half a pixel is True; False in the padding."""
    square = np.zeros((placement.size, placement.size), np.uint8)
    levels = mask.view(np.uint8) * np.uint8(255)
    return _resample(levels, placement, square, Image.Resampling.BOX) > 127


def place_parts(parts: np.ndarray, placement: Placement) -> np.ndarray:
    """Part labels uint8 [H, W] -> [S, S]; nearest, so never blended; 0 in the padding."""
    square = np.zeros((placement.size, placement.size), np.uint8)
    return _resample(parts, placement, square, Image.Resampling.NEAREST)


def mask_box(box: Box, size: int) -> np.ndarray:
    """bool [S, S], True inside the box."""
    mask = np.zeros((size, size), np.bool_)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def _resample(
    pixels: np.ndarray, placement: Placement, square: np.ndarray, resampling: Image.Resampling
) -> np.ndarray:
    """Resamples the visible pixels into `square` and mirrors them."""
    left, top, right, bottom = placement.inside
    (ox, oy), zoom, (x0, y0, x1, y1) = placement.origin, placement.zoom, placement.content
    # Rounding, or a line thinner than a pixel, may reach beyond the content.
    source = (
        min(max(ox + left / zoom, x0), x1),
        min(max(oy + top / zoom, y0), y1),
        min(max(ox + right / zoom, x0), x1),
        min(max(oy + bottom / zoom, y0), y1),
    )
    whole = tuple(round(edge) for edge in source)
    exact = all(abs(a - b) < 1e-6 for a, b in zip(whole, source))
    if exact and (whole[2] - whole[0], whole[3] - whole[1]) == (right - left, bottom - top):
        part = pixels[whole[1] : whole[3], whole[0] : whole[2]]
    else:
        # Cropped first: the filter would otherwise blend in pixels beyond the content's edge.
        picture = Image.fromarray(np.ascontiguousarray(pixels[y0:y1, x0:x1]))
        box = (source[0] - x0, source[1] - y0, source[2] - x0, source[3] - y0)
        part = np.asarray(picture.resize((right - left, bottom - top), resampling, box))
    if placement.flip:
        square[top:bottom, placement.size - right : placement.size - left] = part[:, ::-1]
    else:
        square[top:bottom, left:right] = part
    return square
