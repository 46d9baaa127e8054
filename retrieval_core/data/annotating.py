"""Annotates pictures by models: head box, figure mask, parts, answers and the garment's embedding.

What lies beside a picture is always taken instead of what a model says. Results are cached by the
picture's content and the model, so that pictures seen before are not even opened again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from PIL import Image

from ..errors import RetrievalError
from ..files import atomic_write, write_text
from .beside import has_unusable_box, read_mask, read_parts
from .pictures import load_picture
from .sample import Box, clip_box
from .stages import set_columns

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["head_box", "mask", "parts", "answer", "garment"]

# In the order in which a picture's annotators are asked, with what else each may look at.
USES: dict[str, tuple[str, ...]] = {
    "head_box": (),
    "mask": (),
    "parts": ("mask",),
    "answer": (),
    "garment": ("head_box", "mask"),
}
IMAGES = ("mask", "parts")  # kinds whose results are images of the picture's size
# Pictures that are in memory at a time.
BATCH = 16


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture, and what its annotator's kind may look at (see `USES`), where it is known.

    image: uint8 [H, W, 3]. sha256: of the file, in hexadecimal. mask: bool [H, W], True on the
    figure. head_box: (x0, y0, x1, y1) in pixels, half open.
    """

    image: np.ndarray
    sha256: str
    mask: np.ndarray | None = None
    head_box: Box | None = None


class Annotator(Protocol):
    """A model that annotates pictures, or a known truth that does it for one.

    fingerprint: names the model, its weights and its settings; results are cached under it.
    """

    kind: Kind
    fingerprint: str

    def annotate(self, pictures: list[Picture]) -> list[Any]:
        """One result per picture, in order, None where there is none.

        Of kind head_box (x0, y0, x1, y1) in pixels; of mask bool [H, W]; of parts uint8 [H, W];
        of answer a str; of garment a float32 vector, always of one length.
        """
        ...


def annotate(rows: pa.Table, annotators: Sequence[Annotator], cache: Path) -> pa.Table:
    """Fills head_box, mask and parts where they are null, and adds answer, garment and unusable.

    Masks and parts are paths: of a file beside the picture, or in the cache. The column unusable
    lists the kinds of annotation that lie beside the picture and cannot be read, select nothing, or
    miss the picture; a model's takes their place.

    Args:
        rows: with root, image, sha256, width, height, head_box, mask and parts.
        annotators: at most one of a kind; a kind without one leaves nulls.
        cache: a folder, for results by picture and model.
    """
    import pyarrow as pa

    by_kind = {annotator.kind: annotator for annotator in annotators}
    ordered = [by_kind[kind] for kind in USES if kind in by_kind]
    pictures = [_RowPicture(row) for row in rows.to_pylist()]
    for start in range(0, len(pictures), BATCH):
        batch = pictures[start : start + BATCH]
        for annotator in ordered:
            _annotate_batch(batch, annotator, cache / "annotations")
        for picture in batch:
            picture.image = None
    types = {
        "head_box": pa.list_(pa.int32()),
        "mask": pa.string(),
        "parts": pa.string(),
        "answer": pa.string(),
        "garment": pa.list_(pa.float32()),
    }
    added = {kind: pa.array([p.found[kind] for p in pictures], types[kind]) for kind in types}
    added["unusable"] = pa.array([p.unusable for p in pictures], pa.list_(pa.string()))
    return set_columns(rows, added)


class _RowPicture:
    """A row's picture while it is annotated.

    Attributes:
        found: kind -> value of the row. unusable: kinds of annotation beside the picture.
        image: pixels, from when an annotator first needs them until its batch is done.
    """

    def __init__(self, row: dict[str, Any]) -> None:
        self.root, self.name = row["root"], row["image"]
        self.sha256, self.size = row["sha256"], (row["width"], row["height"])
        self.image: np.ndarray | None = None
        self.found: dict[str, Any] = dict.fromkeys(USES)
        self.unusable: list[str] = []
        for kind, read in (("mask", read_mask), ("parts", read_parts)):
            if row[kind] is not None:
                try:
                    read(row[kind], *self.size)
                    self.found[kind] = row[kind]
                except RetrievalError:
                    self.unusable.append(kind)
        if row["head_box"] is not None:
            self.found["head_box"] = clip_box(row["head_box"], *self.size)
        if self.found["head_box"] is None:
            if row["head_box"] is not None or has_unusable_box(Path(self.root, self.name)):
                self.unusable.append("head_box")

    def make_key(self, kind: str) -> str:
        """A digest of all that an annotator of `kind` looks at."""
        digest = hashlib.sha256(self.sha256.encode())
        for used in USES[kind]:
            value = self.found[used]
            if used in IMAGES and value is not None:
                value = hashlib.sha256(Path(value).read_bytes()).hexdigest()
            digest.update(f"{used}: {value}".encode())
        return digest.hexdigest()

    def load(self, kind: str) -> Picture:
        """The picture with what an annotator of `kind` looks at."""
        if self.image is None:
            self.image = load_picture(self.root, self.name)
        picture, uses = Picture(self.image, self.sha256), USES[kind]
        if "mask" in uses and self.found["mask"] is not None:
            picture = replace(picture, mask=read_mask(self.found["mask"], *self.size))
        if "head_box" in uses:
            picture = replace(picture, head_box=self.found["head_box"])
        return picture


def _annotate_batch(pictures: Sequence[_RowPicture], annotator: Annotator, cache: Path) -> None:
    """Sets what `annotator` finds, from the cache where it has seen the picture."""
    kind = annotator.kind
    name = hashlib.sha256(annotator.fingerprint.encode()).hexdigest()[:16]
    missing = []
    for picture in pictures:
        if picture.found[kind] is None:
            key = picture.make_key(kind)
            path = cache / f"{kind}-{name}" / key[:2] / f"{key}.json"
            if not _read_cached(picture, kind, path):
                missing.append((picture, path))
    if not missing:
        return
    results = annotator.annotate([picture.load(kind) for picture, _ in missing])
    for (picture, path), result in zip(missing, results, strict=True):
        _write_cached(kind, path, result)
        _read_cached(picture, kind, path)


def _read_cached(picture: _RowPicture, kind: str, path: Path) -> bool:
    """Sets a cached result; False if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # ValueError: emptied by a power failure
        return False
    if kind in IMAGES and value is not None:
        value = str(path.with_name(value))
    picture.found[kind] = value
    return True


def _write_cached(kind: str, path: Path, result: Any) -> None:
    """Writes a result as JSON; an image as PNG and, after it, its name as JSON."""
    if result is None or kind == "answer":
        value = result
    elif kind in IMAGES:
        levels = result.view(np.uint8) * np.uint8(255) if kind == "mask" else result
        image, target = Image.fromarray(levels), path.with_suffix(".png")
        atomic_write(target, lambda temporary: image.save(temporary, "PNG"))
        value = target.name
    else:  # numbers
        value = np.asarray(result).tolist()
    write_text(path, json.dumps(value), sync=False)
