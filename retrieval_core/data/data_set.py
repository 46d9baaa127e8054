"""The data set's format: `dataset.json`, `index.parquet`, `masks/` and, where copied, `images/`.

The index has one row for each picture; `SCHEMA` lists its columns. `root` names a folder that
`dataset.json` lists with its path, or is empty for the data set's own folder: pictures that were
moved are found again once that path is changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from ..errors import RetrievalError, explain, import_library
from ..files import parse_json, write_text
from .beside import read_mask, read_parts
from .prepare import load_image
from .sample import Sample
from .sources import read_picture

if TYPE_CHECKING:
    import pyarrow as pa

Task = Literal["same character", "composition"]  # §3.3

FORMAT, FORMAT_VERSION = "retrieval_data_set", 1
INFO, INDEX = "dataset.json", "index.parquet"

# Column -> type, by pyarrow's names. head_box: (x0, y0, x1, y1), half open. outfit: number within
# character and artist, -1 if unknown. mask, parts: PNG below the data set's folder.
SCHEMA = {
    "root": "string",
    "image": "string",
    "sha256": "string",
    "width": "int32",
    "height": "int32",
    "character": "string",
    "artist": "string",
    "outfit": "int32",
    "tags": "list",
    "caption": "string",
    "head_box": "box",
    "mask": "string",
    "parts": "string",
    "split": "string",
    "source": "string",
    "licence": "string",
}

HELD_OUT_PERCENT = 5
# With fewer characters none is held out: the split by hash could take the only one.
FEWEST_TO_HOLD_OUT = 20

# Sources whose pictures do not lie in a folder as files, so that they are always copied.
_ALWAYS_COPIED = ("webdataset",)
_BATCH = 16384  # rows of the index that are in memory as Python values at a time


def schema() -> pa.Schema:
    """The index's columns and types."""
    import pyarrow as pa

    types = {
        "string": pa.string(),
        "int32": pa.int32(),
        "list": pa.list_(pa.string()),
        "box": pa.list_(pa.int32()),
    }
    return pa.schema([(name, types[kind]) for name, kind in SCHEMA.items()])


def is_held_out(character: str) -> bool:
    """Whether a character belongs to the held-out split, by a hash of its name."""
    digest = hashlib.sha256(character.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def write_data_set(
    folder: Path, rows: pa.Table, made: Mapping[str, Any], *, copy: bool = False
) -> None:
    """Writes a data set into a new folder.

    Args:
        rows: the columns of `SCHEMA` except `split`, others are ignored. `root` is the absolute
            path of the folder or shard that `image` lies in; `mask` and `parts` absolute paths
            of files that `beside.read_mask` and `beside.read_parts` read, or null.
        made: how it was made: the command and its figures, as JSON.
        copy: copies the pictures into the data set; those of WebDataset shards always are.

    Raises:
        RetrievalError: the folder exists or cannot be written, or a picture changed meanwhile.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    roots = _name_roots(rows, copy)
    characters = rows["character"].unique().to_pylist()
    held_out = {name for name in characters if is_held_out(name)}
    if len(characters) < FEWEST_TO_HOLD_OUT:
        held_out = set()
    digest = hashlib.sha256()
    try:
        folder.mkdir(parents=True)
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            pq.ParquetWriter(folder / INDEX, schema(), compression="zstd") as writer,
        ):
            for batch in _split(rows):
                written = list(pool.map(lambda row: _write_row(folder, row, roots, copy), batch))
                for row in written:
                    row["split"] = "held_out" if row["character"] in held_out else "train"
                _digest_rows(digest, folder, written)
                writer.write_table(pa.Table.from_pylist(written, schema()))
        info = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": digest.hexdigest(),
            "counts": {"images": rows.num_rows, "characters": len(characters)},
            "roots": {name: root for root, name in roots.items()},
            "made": dict(made),
        }
        write_text(folder / INFO, json.dumps(info, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RetrievalError(
            f"Could not write the data set '{folder}' ({error.strerror or error}); choose a new "
            "folder that can be written, with enough room."
        ) from error


def _split(rows: pa.Table) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, rows.num_rows, _BATCH):
        yield rows.slice(start, _BATCH).to_pylist()


def _name_roots(rows: pa.Table, copy: bool) -> dict[str, str]:
    """Root folder -> its name in the index: its last part, numbered where two are alike."""
    names: dict[str, str] = {}
    pairs = zip(rows["root"].to_pylist(), rows["source"].to_pylist())
    for root in sorted({root for root, source in pairs if not _is_copied(source, copy)}):
        base = Path(root).name or "root"
        name, number = base, 1
        while name in names.values():
            number += 1
            name = f"{base}-{number}"
        names[root] = name
    return names


def _is_copied(source: str, copy: bool) -> bool:
    return copy or source in _ALWAYS_COPIED


def _write_row(
    folder: Path, row: dict[str, Any], roots: Mapping[str, str], copy: bool
) -> dict[str, Any]:
    """Copies what belongs to one row into the data set; returns the row of the index."""
    written = {name: row.get(name) for name in SCHEMA}
    written["root"] = roots.get(row["root"], "")
    stem = f"{row['sha256'][:2]}/{row['sha256']}"
    if _is_copied(row["source"], copy):
        content = read_picture(row["root"], row["image"])
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            raise RetrievalError(
                f"'{row['image']}' in '{row['root']}' changed while the data set was built; build "
                "again."
            )
        written["root"] = ""
        written["image"] = f"images/{stem}{Path(row['image']).suffix.lower()}"
        _write_bytes(folder / written["image"], content)
    size = (row["width"], row["height"])
    if row["mask"] is not None:
        written["mask"] = f"masks/{stem}.png"
        _write_png(folder / written["mask"], np.uint8(255) * read_mask(row["mask"], *size))
    if row["parts"] is not None:
        written["parts"] = f"masks/{stem}.parts.png"
        _write_png(folder / written["parts"], read_parts(row["parts"], *size))
    return written


def _write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _write_png(path: Path, levels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path, "PNG")


def fingerprint_data_set(folder: Path, index: pa.Table) -> str:
    """SHA-256 of the index's rows and of the masks, in hexadecimal.

    The pictures' own digests are in the rows. Where the roots lie does not matter.
    """
    digest = hashlib.sha256()
    for batch in _split(index):
        _digest_rows(digest, folder, batch)
    return digest.hexdigest()


def _digest_rows(digest: Any, folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
        digest.update(json.dumps([row[name] for name in SCHEMA], ensure_ascii=False).encode())
        for kind in ("mask", "parts"):
            if row[kind] is not None:
                digest.update((folder / row[kind]).read_bytes())


def read_info(folder: Path) -> dict[str, Any]:
    """The content of a data set's `dataset.json`.

    Raises RetrievalError if the folder is not a data set or has a newer version.
    """
    path = folder / INFO
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RetrievalError(
            f"'{folder}' is not a data set (its {INFO} cannot be read: {explain(error)}); name a "
            "folder made by 'python -m retrieval_core.data build'."
        ) from error
    info = parse_json(text, INFO, folder)
    if info.get("format") != FORMAT or not isinstance(info.get("roots"), dict):
        raise RetrievalError(
            f"'{path}' has the format {info.get('format')!r} where {FORMAT!r} is expected; name a "
            "folder made by 'python -m retrieval_core.data build'."
        )
    if info.get("format_version") != FORMAT_VERSION:
        raise RetrievalError(
            f"'{path}' has format version {info.get('format_version')} and this pack reads "
            f"{FORMAT_VERSION}; update the pack."
        )
    return info


def open_data_set(folder: str | os.PathLike[str]) -> DataSet:
    """Opens a data set; reads its index, and no picture.

    Raises RetrievalError if the folder is not a whole data set, or pyarrow is not installed.
    """
    pa, pq = import_library("pyarrow", "data"), import_library("pyarrow.parquet", "data")
    folder = Path(folder)
    info = read_info(folder)
    try:
        index = pq.read_table(folder / INDEX, schema=schema())
    except (OSError, pa.ArrowException, ValueError) as error:
        raise RetrievalError(
            f"The index '{folder / INDEX}' cannot be read ({explain(error)}); build the data set "
            "again."
        ) from error
    roots = {"": folder, **{name: Path(path) for name, path in info["roots"].items()}}
    identity = number_rows([index["character"], index["artist"]])
    outfit = index["outfit"].to_numpy()
    unknown = outfit < 0
    wearing = number_rows([identity, outfit])
    wearing[unknown] = wearing.max(initial=-1) + 1 + np.arange(unknown.sum())
    has_head_box = index["head_box"].is_valid().to_numpy()
    identities, outfits = Groups.collect(identity), Groups.collect(wearing)
    return DataSet(folder, info, index, roots, identities, outfits, has_head_box)


def number_rows(columns: list[Any]) -> np.ndarray:
    """int64 [N], equal where the rows are equal in all columns; null equals null."""
    numbers = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        if not isinstance(column, np.ndarray):
            encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
            column = encoded.indices.to_numpy(zero_copy_only=False)
        _, values = np.unique(column, return_inverse=True)
        _, numbers = np.unique(numbers * (len(values) + 1) + values, return_inverse=True)
    return numbers


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows grouped by a number.

    numbers: int64 [N], from 0 without a gap. members: for each number its rows, ascending.
    """

    numbers: np.ndarray
    members: list[np.ndarray]

    @classmethod
    def collect(cls, numbers: np.ndarray) -> Groups:
        """Groups rows of any numbers, equal ones together."""
        _, numbers, counts = np.unique(numbers, return_inverse=True, return_counts=True)
        order = np.argsort(numbers, kind="stable")
        return cls(numbers, np.split(order, np.cumsum(counts)[:-1]) if len(order) else [])

    def find_members(self, row: int) -> np.ndarray:
        """All rows of this row's group, itself included."""
        return self.members[self.numbers[row]]


@dataclass(frozen=True, eq=False)
class DataSet:
    """A sequence of `Sample`s, each read from its files when it is asked for.

    index: the columns of `SCHEMA`. roots: name -> folder. identities: rows of one character by one
    artist. outfits: rows of one identity in one outfit; a row of an unknown outfit is alone.
    has_head_box: bool [N].
    """

    folder: Path
    info: dict[str, Any]
    index: pa.Table
    roots: dict[str, Path]
    identities: Groups
    outfits: Groups
    has_head_box: np.ndarray

    def __len__(self) -> int:
        return self.index.num_rows

    def __getitem__(self, row: int) -> Sample:
        """Reads a row's picture and masks. Its tags are the row's, or its caption without tags.

        Raises RetrievalError if a file is missing or damaged, or the picture's size has changed.
        """
        values = self.read_row(row)
        path = self.find_picture(values)
        image, _ = load_image(path)
        width, height = values["width"], values["height"]
        if image.shape[:2] != (height, width):
            raise RetrievalError(
                f"'{path}' has {image.shape[1]}x{image.shape[0]} pixels and had {width}x{height} "
                "when the data set was built; build it again."
            )
        mask, parts, head = values["mask"], values["parts"], values["head_box"]
        return Sample(
            image,
            None if mask is None else read_mask(self._resolve("", mask), width, height),
            None if head is None else tuple(head),
            values["tags"] or ([values["caption"]] if values["caption"] else []),
            None if parts is None else read_parts(self._resolve("", parts), width, height),
        )

    def find_targets(self, task: Task, split: str | None = "train") -> np.ndarray:
        """Rows of a split, or (None) of both, that have another row to take references from."""
        numbers = self.outfits.numbers
        usable = self.has_head_box if task == "composition" else np.ones(len(self), np.bool_)
        others = np.bincount(numbers, usable)[numbers] - usable > 0
        if split is not None:
            others &= np.array(self.index["split"].to_pylist()) == split
        return np.flatnonzero(others)

    def read_row(self, row: int) -> dict[str, Any]:
        """The index's values of one row."""
        return self.index.slice(row, 1).to_pylist()[0]

    def find_picture(self, values: Mapping[str, Any]) -> Path:
        """The path of the picture of a row's values.

        Raises RetrievalError if the row's root is not listed, or the path leaves it.
        """
        return self._resolve(values["root"], values["image"])

    def _resolve(self, root: str, relative: str) -> Path:
        path = Path(relative)
        if root not in self.roots or path.is_absolute() or ".." in path.parts:
            raise RetrievalError(
                f"The index of '{self.folder}' names '{relative}' in the root '{root}', which is "
                f"not a path below a root that {INFO} lists; build the data set again."
            )
        return self.roots[root] / path


def check_data_set(
    folder: Path, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, list[str]]:
    """Compares a data set's pictures, masks and rows with what the index says.

    on_progress: called with (rows done, rows in all).

    Returns:
        Problem -> the pictures that have it; empty if all is well.

    Raises:
        RetrievalError: the folder is not a data set whose index can be read.
    """
    data_set = open_data_set(folder)
    problems: dict[str, list[str]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda row: _find_problem(data_set, row), range(len(data_set)))
        for row, problem in enumerate(found):
            if problem is not None:
                problems.setdefault(problem, []).append(data_set.index["image"][row].as_py())
            if on_progress is not None:
                on_progress(row + 1, len(data_set))
    if not problems and data_set.info["fingerprint"] != fingerprint_data_set(
        data_set.folder, data_set.index
    ):
        problems["the index or a mask was changed after the data set was built"] = [INDEX]
    return problems


def _find_problem(data_set: DataSet, row: int) -> str | None:
    values = data_set.read_row(row)
    try:
        path = data_set.find_picture(values)
        if not path.is_file():
            return "the picture is missing"
        if hashlib.sha256(path.read_bytes()).hexdigest() != values["sha256"]:
            return "the picture was changed"
        data_set[row]
    except RetrievalError:
        return "the picture, its mask or its head box cannot be read"
    return None


def count_stats(data_set: DataSet) -> dict[str, Any]:
    """The figures of the paper's Table 1 for a data set, and how far it is annotated."""
    index, outfits = data_set.index, data_set.outfits
    known = outfits.numbers[index["outfit"].to_numpy() >= 0]
    return {
        "images": len(data_set),
        "held_out": index["split"].to_pylist().count("held_out"),
        "characters": len(index["character"].unique()),
        "artists": len(index["artist"].drop_null().unique()),
        "identities": len(data_set.identities.members),
        "outfits": len(np.unique(known)),
        "images_per_identity": _summarise(np.bincount(data_set.identities.numbers)),
        "images_per_outfit": _summarise(np.unique(known, return_counts=True)[1]),
        "same_character_targets": len(data_set.find_targets("same character", None)),
        "composition_targets": len(data_set.find_targets("composition", None)),
        **{
            f"with_{name}": len(data_set) - index[name].null_count
            for name in ("head_box", "mask", "parts", "caption")
        },
    }


def describe_figures(figures: Mapping[str, Any]) -> dict[str, str]:
    """Figures of a build or of `count_stats` as words: name -> value."""
    return {
        name.replace("_", " "): ", ".join(f"{number} {what}" for what, number in value.items())
        or "none"
        if isinstance(value, dict)
        else str(value)
        for name, value in figures.items()
    }


def _summarise(counts: np.ndarray) -> dict[str, float]:
    if not len(counts):
        return {"mean": 0.0, "median": 0.0, "largest": 0.0}
    values = {"mean": counts.mean(), "median": np.median(counts), "largest": counts.max()}
    return {name: round(float(value), 2) for name, value in values.items()}
