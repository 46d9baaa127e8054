"""Annotations in files beside a picture: figure mask, part labels and head box.

Of `folder/name.png` they are `name.mask.png` or `masks/name.png` (white is the figure),
`name.parts.png` (8-bit part labels, 0 is everything else) and `name.box.json` (the head box in
pixels: `[x0, y0, x1, y1]`, half open, or an object with that list as its `head_box`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import RetrievalError, explain
from .sample import Box

MASK, PARTS, BOX, MASKS_FOLDER = ".mask.png", ".parts.png", ".box.json", "masks"


def is_annotation(path: str) -> bool:
    """Whether a file, by its path relative to the source, annotates a picture."""
    folder, _, name = path.rpartition("/")
    return name.endswith((MASK, PARTS, BOX)) or folder.rpartition("/")[2] == MASKS_FOLDER


def find_beside(path: Path) -> tuple[str | None, str | None, Box | None]:
    """Absolute paths of the mask and the parts beside a picture, and its head box.

    None for each one that is missing, lies outside the picture's folder by a symbolic link, or, of
    the box, cannot be read (see `has_unusable_box`).
    """
    folder = path.parent
    mask = _find(folder, path.stem + MASK) or _find(folder, f"{MASKS_FOLDER}/{path.stem}.png")
    parts = _find(folder, path.stem + PARTS)
    box = _find(folder, path.stem + BOX)
    return mask, parts, None if box is None else _read_box(Path(box))


def has_unusable_box(path: Path) -> bool:
    """Whether the file with a picture's head box is there, and holds none."""
    box = _find(path.parent, path.stem + BOX)
    return box is not None and _read_box(Path(box)) is None


def read_mask(path: str | Path, width: int, height: int) -> np.ndarray:
    """A mask as bool [H, W], resized to the picture's size where it has another.

    Raises:
        RetrievalError: it cannot be read, or selects nothing.
    """
    mask = np.asarray(_read(path, width, height, "L")) > 127
    if not mask.any():
        raise RetrievalError(f"The mask '{path}' selects nothing; paint the figure white.")
    return mask


def read_parts(path: str | Path, width: int, height: int) -> np.ndarray:
    """Part labels as uint8 [H, W], resized to the picture's size where they have another.

    Raises:
        RetrievalError: they cannot be read, or are not of 8 bits.
    """
    return np.array(_read(path, width, height, None))


def _find(folder: Path, name: str) -> str | None:
    path = folder / name
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        return None
    return str(path.absolute())


def _read_box(path: Path) -> Box | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        x0, y0, x1, y1 = value["head_box"] if isinstance(value, dict) else value
        box = (math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return box if box[0] < box[2] and box[1] < box[3] else None


def _read(path: str | Path, width: int, height: int, mode: str | None) -> Image.Image:
    """A PNG in `mode`, or as it is (of 8-bit labels, which a palette or a grey image holds)."""
    try:
        with Image.open(path) as image:
            if mode is None and image.mode not in ("L", "P"):
                raise RetrievalError(
                    f"The part labels '{path}' are a picture of mode {image.mode}; save them as "
                    "8-bit grey or palette PNG."
                )
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.NEAREST)
            return image.convert(mode) if mode else image.copy()
    except RetrievalError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen classes on damaged data
        raise RetrievalError(
            f"The annotation '{path}' cannot be read ({explain(error)}); save it again as PNG."
        ) from error
