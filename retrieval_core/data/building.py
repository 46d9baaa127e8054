"""Builds a data set from tagged pictures (§3.1): scan, measure, annotate, cluster, write.

What a stage has done is kept in a work folder of the cache until the data set is written, so that
the same command goes on where it was stopped.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import RetrievalError, import_library
from .annotating import Annotator, Picture, annotate
from .beside import read_mask
from .data_set import INFO, Groups, number_rows, read_info, write_data_set
from .duplicates import find_duplicates
from .filtering import Rules
from .outfits import cluster_by_answers, cluster_by_garments, embed_garment
from .pictures import HASH, THUMBNAIL, load_picture, measure_pictures
from .sources import TWICE, Chunk, find_chunks, read_chunk
from .stages import digest_json, read_results, run_stage, set_columns

if TYPE_CHECKING:
    import pyarrow as pa

Outfits = Literal["answers", "garments"]
# Called with the stage's name, its chunks done, its chunks in all, rows kept and rows rejected.
Progress = Callable[[str, int, int, int, int], None]

# Reasons of rejection, beside those of `sources`, `filtering` and `pictures`.
COPY = "near-duplicate"
ALONE = "only picture of its character"

PICTURES = 256  # of a chunk
BY_PICTURE = [("root", "ascending"), ("image", "ascending")]


def build_data_set(
    sources: Sequence[Path],
    out: Path,
    *,
    rules: Rules,
    annotators: Sequence[Annotator] = (),
    outfits: Outfits = "garments",
    copy: bool = False,
    cache: Path,
    ray: str | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Builds a data set in the folder `out`, which is replaced if the same command made it.

    Args:
        sources: see `sources.find_chunks`.
        annotators: at most one of a kind; see `annotating.annotate`.
        outfits: what tells them apart: answers, which need an annotator, or the garments' looks.
        copy: copies the pictures into the data set.
        cache: folder for annotations, which later builds reuse, and for unfinished work.
        ray: address of a Ray cluster; see `stages.run_stage`.

    Returns:
        Figures: seen = kept + all of rejected (reason -> number); characters, artists, outfits;
        unusable (kind -> number of annotations beside pictures that cannot be used).

    Raises:
        RetrievalError: a source is not one, nothing can be kept, `out` or `cache` lies in a source
            or cannot be written, `out` is something else, or a package is missing.
    """
    pa = import_library("pyarrow", "data")
    sources, out = [source.absolute() for source in sources], out.absolute()
    command = {
        "sources": [str(source) for source in sources],
        "rules": digest_json([sorted(rules.unwanted), sorted(rules.clothing)]),
        "annotators": {annotator.kind: annotator.fingerprint for annotator in annotators},
        "outfits": outfits,
        "copy": copy,
    }
    _check_folders(sources, out, cache, command)
    work = cache.absolute() / "data-build" / digest_json(command)
    rejected: Counter[str] = Counter()

    def run(name: str, function: Any, chunks: Sequence[Any], settings: Any = None) -> pa.Table:
        label = name.partition("-")[0]
        told = on_progress and partial(on_progress, label)
        results = run_stage(
            name, function, chunks, work, settings=settings, ray=ray, on_progress=told
        )
        table, reasons = read_results(results)
        rejected.update(reasons)
        return table

    chunks = [asdict(chunk) for source in sources for chunk in find_chunks(source)]
    rows = run("scan-1", partial(_scan, rules), chunks, command["rules"])
    seen = rows.num_rows + rejected.total()
    rows = _keep(rows.sort_by(BY_PICTURE), _is_new, TWICE, rejected)
    measures = run("measure-1", measure_pictures, list(_split_pictures(rows)))
    measured = {name: measures[name] for name in measures.column_names if name != "row"}
    rows = set_columns(rows.take(measures["row"]), measured)
    rows = _keep(rows, _is_original, COPY, rejected)
    rows = _keep(rows, _has_company, ALONE, rejected)
    if not rows.num_rows:
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(rejected.items()))
        raise RetrievalError(
            f"None of the {seen} pictures can be used ({reasons}); give other sources, or edit "
            "the lists of tags."
        )
    rows = _annotate(rows, annotators, cache.absolute(), on_progress)
    if outfits == "garments" and "garment" not in command["annotators"]:
        shown = rows.select(["root", "image", "sha256", "width", "height", "head_box", "mask"])
        garments = run("garments-1", embed_garments, [b.to_pylist() for b in _split(shown)])
        rows = set_columns(rows, {"garment": garments["garment"]})
    rows = set_columns(rows, {"outfit": pa.array(_cluster(rows, outfits), pa.int32())})
    figures = {
        "seen": seen,
        "kept": rows.num_rows,
        "rejected": dict(sorted(rejected.items())),
        **_count(rows),
    }
    _write(out, rows, {"command": command, "figures": figures}, copy)
    shutil.rmtree(work)
    return figures


def _check_folders(
    sources: Sequence[Path], out: Path, cache: Path, command: Mapping[str, Any]
) -> None:
    """Refuses to write into a source, or over anything but a data set of the same command."""
    for folder, what in ((out, "data set"), (cache, "cache")):
        for source in sources:
            if folder.resolve().is_relative_to(source.resolve()):
                raise RetrievalError(
                    f"The {what} '{folder}' would be written into the source '{source}'; choose a "
                    "folder outside of it."
                )
    replaced = _name_beside(out, "old")
    if replaced.exists() and not out.exists():  # stopped while it was being replaced
        replaced.rename(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / INFO).is_file():
        raise RetrievalError(
            f"'{out}' is not a data set, so it is not replaced; name a new folder."
        )
    if read_info(out).get("made", {}).get("command") != command:
        raise RetrievalError(
            f"The data set '{out}' was built by another command; name a new folder, or remove it."
        )


def _name_beside(out: Path, ending: str) -> Path:
    return out.with_name(f".{out.name}.{ending}")


def _scan(rules: Rules, chunk: Mapping[str, Any]) -> tuple[pa.Table, dict[str, int]]:
    return read_chunk(Chunk(**chunk), rules)


def _keep(
    rows: pa.Table, choose: Callable[[pa.Table], np.ndarray], reason: str, rejected: Counter[str]
) -> pa.Table:
    """The rows for which `choose` gives True; the others are counted as rejected."""
    chosen = choose(rows)
    if not chosen.all():
        rejected[reason] += int((~chosen).sum())
    return rows.filter(chosen)


def _is_new(rows: pa.Table) -> np.ndarray:
    """bool [N], False where a sorted row is of the picture before it."""
    pictures = list(zip(rows["root"].to_pylist(), rows["image"].to_pylist()))
    return np.array([i == 0 or pictures[i] != pictures[i - 1] for i in range(len(pictures))], bool)


def _is_original(rows: pa.Table) -> np.ndarray:
    """bool [N], False for near-duplicates."""
    count = rows.num_rows
    hashes = np.frombuffer(b"".join(rows["hash"].to_pylist()), np.uint8)
    thumbnails = np.frombuffer(b"".join(rows["thumbnail"].to_pylist()), np.uint8)
    copies = find_duplicates(
        hashes.reshape(count, HASH * HASH // 8),
        thumbnails.reshape(count, THUMBNAIL, THUMBNAIL, 3),
        rows["width"].to_numpy().astype(np.int64) * rows["height"].to_numpy(),
    )
    return copies < 0


def _has_company(rows: pa.Table) -> np.ndarray:
    """bool [N], whether there is another picture of the row's character."""
    characters = rows["character"].to_pylist()
    counts = Counter(characters)
    return np.array([counts[character] > 1 for character in characters], bool)


def _split(rows: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, rows.num_rows, PICTURES):
        yield rows.slice(start, PICTURES)


def _split_pictures(rows: pa.Table) -> Iterator[dict[str, Any]]:
    """Chunks of `measure_pictures`, each of one root."""
    roots, images = rows["root"].to_pylist(), rows["image"].to_pylist()
    first = 0
    while first < len(roots):
        stop = first
        while stop < min(first + PICTURES, len(roots)) and roots[stop] == roots[first]:
            stop += 1
        chunk = {"root": roots[first], "images": images[first:stop], "first": first}
        yield {**chunk, "stamp": _stamp(roots[first], images[first:stop])}
        first = stop


def _stamp(root: str, images: Sequence[str]) -> str:
    """A digest of the files' sizes and times of change: a changed picture is measured again."""
    files = [root] if os.path.isfile(root) else [f"{root}/{image}" for image in images]
    stamps = []
    for file in files:
        try:
            found = os.stat(file)
            stamps.append((found.st_size, found.st_mtime_ns))
        except (OSError, ValueError):
            stamps.append(None)
    return digest_json(stamps)


def _annotate(
    rows: pa.Table, annotators: Sequence[Annotator], cache: Path, on_progress: Progress | None
) -> pa.Table:
    """`annotate`, a chunk at a time, in this process, which has the models."""
    import pyarrow as pa

    done = []
    parts = list(_split(rows))
    for part in parts:
        done.append(annotate(part, annotators, cache))
        if on_progress is not None:
            kept = sum(table.num_rows for table in done)
            on_progress("annotate", len(done), len(parts), kept, 0)
    return pa.concat_tables(done)


def embed_garments(chunk: Sequence[Mapping[str, Any]]) -> tuple[pa.Table, dict[str, int]]:
    """A stage's function: the column `garment`, null where mask or head box are unknown."""
    import pyarrow as pa

    garments = []
    for row in chunk:
        embedding = None
        if row["mask"] is not None and row["head_box"] is not None:
            image = load_picture(row["root"], row["image"])
            mask = read_mask(row["mask"], row["width"], row["height"])
            embedding = embed_garment(Picture(image, row["sha256"], mask, tuple(row["head_box"])))
        garments.append(None if embedding is None else embedding.tolist())
    return pa.table({"garment": pa.array(garments, pa.list_(pa.float32()))}), {}


def _cluster(rows: pa.Table, outfits: Outfits) -> np.ndarray:
    """The outfit of each row, numbered within its character and artist."""
    column, cluster = {
        "answers": ("answer", cluster_by_answers),
        "garments": ("garment", cluster_by_garments),
    }[outfits]
    numbers = np.full(rows.num_rows, -1)
    for members in Groups.collect(number_rows([rows["character"], rows["artist"]])).members:
        numbers[members] = cluster(rows[column].take(members).to_pylist())
    return numbers


def _count(rows: pa.Table) -> dict[str, Any]:
    characters, artists = rows["character"].to_pylist(), rows["artist"].to_pylist()
    outfits = set(zip(characters, artists, rows["outfit"].to_pylist()))
    unusable = Counter(kind for kinds in rows["unusable"].to_pylist() for kind in kinds)
    return {
        "characters": len(set(characters)),
        "artists": len(set(artists) - {None}),
        "outfits": sum(outfit >= 0 for _, _, outfit in outfits),
        "unusable": dict(sorted(unusable.items())),
    }


def _write(out: Path, rows: pa.Table, made: Mapping[str, Any], copy: bool) -> None:
    """Writes the data set beside its place, then puts it there."""
    partial_, replaced = _name_beside(out, "partial"), _name_beside(out, "old")
    for left in (partial_, replaced):  # by a build that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        write_data_set(partial_, rows, made, copy=copy)
    except BaseException:
        shutil.rmtree(partial_, ignore_errors=True)
        raise
    if out.exists():
        out.rename(replaced)
    partial_.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)
