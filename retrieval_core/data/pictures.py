"""Measures pictures: digest, size, perceptual hash and thumbnail; tells which cannot be used."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .prepare import LARGEST_IMAGE, convert_mode
from .sample import NEUTRAL
from .stages import import_library

if TYPE_CHECKING:
    import pyarrow as pa

# 16 x 16 bits of the cosine transform of 64 x 64 pixels; thumbnails have 8 x 8.
HASH, PIXELS, THUMBNAIL = 16, 64, 8

OUTSIDE = "picture outside of its source's folder"
MISSING = "picture missing"
EMPTY = "picture file empty"
UNKNOWN = "not a picture"
TOO_LARGE = "picture with too many pixels"
DAMAGED = "picture damaged"
TRANSPARENT = "picture transparent throughout"


@dataclass(frozen=True, eq=False)
class Measures:
    """What is known of a picture once it was decoded.

    sha256: of the file, in hexadecimal. width, height: upright, in pixels. hash: 32 bytes.
    thumbnail: uint8 [8, 8, 3].
    """

    sha256: str
    width: int
    height: int
    hash: bytes
    thumbnail: np.ndarray


def measure_pictures(chunk: Mapping[str, Any]) -> tuple[pa.Table, dict[str, int]]:
    """A stage's function: measures the pictures `images` of the folder `root`.

    Returns:
        Rows of those that can be used: `position` in the chunk, sha256, width, height, hash,
        thumbnail; and the others counted by reason.
    """
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    rejected: Counter[str] = Counter()
    for position, image in enumerate(chunk["images"]):
        content = read_picture(chunk["root"], image)
        measures = measure_picture(content) if isinstance(content, bytes) else content
        if isinstance(measures, str):
            rejected[measures] += 1
        else:
            row = {**vars(measures), "thumbnail": measures.thumbnail.tobytes()}
            rows.append({"position": position, **row})
    schema = pa.schema(
        {
            "position": pa.int32(),
            "sha256": pa.string(),
            "width": pa.int32(),
            "height": pa.int32(),
            "hash": pa.binary(HASH * HASH // 8),
            "thumbnail": pa.binary(THUMBNAIL * THUMBNAIL * 3),
        }
    )
    return pa.Table.from_pylist(rows, schema), dict(rejected)


def read_picture(root: str, image: str) -> bytes | str:
    """The content of a picture's file, or the reason why there is none."""
    path = Path(root, image)
    try:
        if not path.resolve().is_relative_to(Path(root).resolve()):
            return OUTSIDE
        if not path.is_file():
            return MISSING
        return path.read_bytes() or EMPTY
    except (OSError, ValueError):  # ValueError: a null character in the name
        return MISSING


def measure_picture(content: bytes) -> Measures | str:
    """Measures a picture, or tells why it cannot be used."""
    imagehash = import_library("imagehash")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content))
        width, height = image.size
        if width * height > LARGEST_IMAGE:
            return TOO_LARGE
        if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # on its side
            width, height = height, width
        # A JPEG is decoded at the smallest scale that is large enough, several times as fast.
        image.draft(None, (2 * PIXELS, 2 * PIXELS))
        image.load()
        image = convert_mode(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        return TOO_LARGE
    except Image.UnidentifiedImageError:
        return UNKNOWN
    except Exception:  # Pillow's decoders raise a dozen classes on damaged data
        return DAMAGED
    if image.mode == "RGBA" and image.getchannel("A").getextrema()[1] == 0:
        return TRANSPARENT
    small = image.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS, reducing_gap=2.0)
    if small.mode == "RGBA":
        canvas = Image.new("RGB", small.size, NEUTRAL)
        canvas.paste(small, mask=small.getchannel("A"))
        small = canvas
    bits = imagehash.phash(small, HASH, PIXELS // HASH).hash
    digest = hashlib.sha256(content).hexdigest()
    thumbnail = np.asarray(small.reduce(PIXELS // THUMBNAIL))
    return Measures(digest, width, height, np.packbits(bits).tobytes(), thumbnail)
