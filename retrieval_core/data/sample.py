"""`Sample`, an annotated picture of a data set, and `Reference`, a concept cut from one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..errors import RetrievalError

Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]
Concept = Literal["figure", "face", "clothes"]

NEUTRAL: Colour = (127, 127, 127)  # padding and background at inference


def clip_box(box: Box, width: int, height: int) -> Box | None:
    """The part of a box that lies in the picture, or None."""
    x0, y0, x1, y1 = box
    clipped = (max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))
    return clipped if clipped[0] < clipped[2] and clipped[1] < clipped[3] else None


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture of a character.

    image: uint8 [H, W, 3]. mask: bool [H, W], True on the figure, or None if unknown.
    head_box: (x0, y0, x1, y1) in pixels, half open, or None; clipped to the image.
    tags: content of the text prompt.
    parts: uint8 [H, W], part labels (hair, upper garment, ...), 0 where nothing may be retrieved,
    or None if unknown; see `training.correspondence`.

    Raises RetrievalError on other shapes or types, or a head box outside the image.
    """

    image: np.ndarray
    mask: np.ndarray | None = None
    head_box: Box | None = None
    tags: list[str] = field(default_factory=list)
    parts: np.ndarray | None = None

    def __post_init__(self) -> None:
        image, mask = self.image, self.mask
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise RetrievalError(
                f"A sample's image is {image.dtype} {list(image.shape)}; it must be uint8 "
                "[height, width, 3] with at least one pixel."
            )
        height, width = image.shape[:2]
        if mask is not None and (mask.dtype != np.bool_ or mask.shape != (height, width)):
            raise RetrievalError(
                f"A sample's mask is {mask.dtype} {list(mask.shape)}; it must be bool "
                f"[{height}, {width}] like its image."
            )
        parts = self.parts
        if parts is not None and (parts.dtype != np.uint8 or parts.shape != (height, width)):
            raise RetrievalError(
                f"A sample's parts are {parts.dtype} {list(parts.shape)}; they must be uint8 "
                f"[{height}, {width}] like its image."
            )
        if self.head_box is not None:
            x0, y0, x1, y1 = (int(edge) for edge in self.head_box)
            box = clip_box((x0, y0, x1, y1), width, height)
            if box is None:
                raise RetrievalError(
                    f"The head box {(x0, y0, x1, y1)} covers nothing of its {width}x{height} "
                    "image; give (x0, y0, x1, y1) in pixels, or None."
                )
            object.__setattr__(self, "head_box", box)


@dataclass(frozen=True, eq=False)
class Reference:
    """One reference image as the encoder takes it.

    image: uint8 [S, S, 3]. mask: bool [S, S], True on content (never on padding), or None if the
    whole square is content. concept: what to take from it. parts: uint8 [S, S], part labels as in
    `Sample`, 0 in the padding, or None.
    """

    image: np.ndarray
    mask: np.ndarray | None
    concept: Concept
    parts: np.ndarray | None = None
