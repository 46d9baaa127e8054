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

from ..errors import RetrievalError, explain, import_library
from .prepare import LARGEST_IMAGE, convert_mode, decode_image
from .sample import NEUTRAL
from .sources import NOT_A_PICTURE, OUTSIDE, read_picture

if TYPE_CHECKING:
    import pyarrow as pa

# 16 x 16 bits of the cosine transform of 64 x 64 pixels; thumbnails have 8 x 8.
HASH, PIXELS, THUMBNAIL = 16, 64, 8

# Reasons of rejection, beside those of `sources`.
MISSING = "picture missing"
EMPTY = "picture file empty"
TOO_LARGE = "picture with too many pixels"
DAMAGED = "picture damaged"
TRANSPARENT = "picture transparent throughout"


@dataclass(frozen=True, eq=False)
class Measures:
    """What is known of a picture once it was decoded.

    sha256: of the file, in hexadecimal. width, height: upright, in pixels. hash: 32 bytes.
    thumbnail: 8 x 8 pixels of 3 bytes.
    """

    sha256: str
    width: int
    height: int
    hash: bytes
    thumbnail: bytes


def measure_pictures(chunk: Mapping[str, Any]) -> tuple[pa.Table, dict[str, int]]:
    """A stage's function: measures the pictures `images` of the folder or shard `root`.

    Returns:
        Those that can be used: `row`, their number counted from the chunk's `first`, and their
        `Measures`; of the others how many were rejected by reason.
    """
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    rejected: Counter[str] = Counter()
    for row, image in enumerate(chunk["images"], chunk["first"]):
        measures = measure_file(chunk["root"], image)
        if isinstance(measures, Measures):
            rows.append({"row": row, **vars(measures)})
        else:
            rejected[measures] += 1
    schema = pa.schema(
        {
            "row": pa.int64(),
            "sha256": pa.string(),
            "width": pa.int32(),
            "height": pa.int32(),
            "hash": pa.binary(HASH * HASH // 8),
            "thumbnail": pa.binary(THUMBNAIL * THUMBNAIL * 3),
        }
    )
    return pa.Table.from_pylist(rows, schema), dict(rejected)


def measure_file(root: str, image: str) -> Measures | str:
    """Measures the picture of a row, or tells why it cannot be used."""
    path = Path(root, image)
    try:
        if not path.resolve().is_relative_to(Path(root).resolve()):
            return OUTSIDE
        content = read_picture(root, image)
    except (OSError, ValueError):  # ValueError: a null character in the name
        return MISSING
    return measure_picture(content) if content else EMPTY


def load_picture(root: str, image: str) -> np.ndarray:
    """The picture of a row as uint8 [H, W, 3]; see `prepare.load_image`.

    Raises:
        RetrievalError: it cannot be read, or not any more.
    """
    try:
        content = read_picture(root, image)
    except OSError as error:
        raise RetrievalError(
            f"'{image}' in '{root}' cannot be read any more ({explain(error)}); build again."
        ) from error
    return decode_image(io.BytesIO(content), f"{root}/{image}")[0]


def measure_picture(content: bytes) -> Measures | str:
    """Measures a picture, or tells why it cannot be used."""
    imagehash = import_library("imagehash", "data")
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
        return NOT_A_PICTURE
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
    thumbnail = small.reduce(PIXELS // THUMBNAIL).tobytes()
    return Measures(digest, width, height, np.packbits(bits).tobytes(), thumbnail)
