"""Measures what a build recovers of a paper-doll booru: characters, artists, outfits, faults.

A pair of pictures counts as recovered if both are in the data set and in one cluster of it, as they
are in truth. Recall counts pairs that the build lost with their pictures; precision only pairs
that it made. Mask and head box come from the truth where none lies beside the picture, the answers
from the truth too, a share of them wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.annotating import Kind, Picture
from ..data.building import build_data_set
from ..data.data_set import open_data_set
from ..data.filtering import load_rules
from ..errors import RetrievalError
from .booru import COPIES, PLAIN, make_booru, read_figure
from .draw import render
from .world import GARMENT_COLOURS, Figure

WRONG = (0.0, 0.1, 0.3)  # shares of answers
ALIKE = 0.25
PHRASES = (
    "{} and {}",
    "{}, {}",
    "The top two colors of the character's clothes are {} and {}.",
)


@dataclass(frozen=True, eq=False)
class TruthAnnotator:
    """Mask, head box or answer of pictures whose figures are known by their digest."""

    kind: Kind
    figures: Mapping[str, Figure]
    wrong: float = 0.0

    @property
    def fingerprint(self) -> str:
        return f"paper-doll truth, {self.wrong:.0%} wrong"

    def annotate(self, pictures: list[Picture]) -> list[Any]:
        return [getattr(self, f"_find_{self.kind}")(picture) for picture in pictures]

    def _find_mask(self, picture: Picture) -> np.ndarray:
        mask = Image.fromarray(render(self.figures[picture.sha256]).mask.astype(np.uint8))
        height, width = picture.image.shape[:2]
        return np.asarray(mask.resize((width, height), Image.Resampling.NEAREST)) > 0

    def _find_head_box(self, picture: Picture) -> tuple[int, ...]:
        rendering = render(self.figures[picture.sha256])
        zoom = picture.image.shape[0] / rendering.image.shape[0]
        return tuple(round(zoom * edge) for edge in rendering.head_box)

    def _find_answer(self, picture: Picture) -> str:
        rng = np.random.default_rng([int(picture.sha256[:8], 16), round(100 * self.wrong)])
        outfit = self.figures[picture.sha256].outfit
        colours = (outfit.upper_colour, outfit.lower_colour)
        if rng.random() < self.wrong:
            names = list(GARMENT_COLOURS)
            others = [(a, b) for a in names for b in names if a != b and (a, b) != colours]
            colours = others[int(rng.integers(len(others)))]
        return PHRASES[int(rng.integers(len(PHRASES)))].format(*colours)


@dataclass(frozen=True, eq=False)
class Truth:
    """The rows of `truth.parquet` by the pictures' digests."""

    rows: Mapping[str, dict[str, Any]]
    figures: Mapping[str, Figure] = field(repr=False)

    @classmethod
    def load(cls, folder: Path) -> Truth:
        import pyarrow.parquet as pq

        table = pq.read_table(folder / "truth.parquet").to_pylist()
        rows = {row["sha256"]: row for row in table if row["kind"] != "empty file"}
        return cls(rows, {digest: read_figure(row["figure"]) for digest, row in rows.items()})

    def find_keepable(self) -> dict[int, dict[str, Any]]:
        """What a faultless build keeps: id of an original -> its row."""
        plain = {row["id"]: row for row in self.rows.values() if row["kind"] == PLAIN}
        counts = Counter(row["character"] for row in plain.values())
        return {key: row for key, row in plain.items() if counts[row["character"]] > 1}


def measure_booru(folder: Path, count: int, seed: int, alike: float) -> dict[str, Any]:
    """Makes a booru in a new folder and builds data sets from it in all ways; their figures."""
    make_booru(folder / "source", count, seed, alike)
    truth = Truth.load(folder / "source")
    result: dict[str, Any] = {}
    for outfits, wrong in [("garments", 0.0), *(("answers", wrong) for wrong in WRONG)]:
        name = outfits if outfits == "garments" else f"answers, {wrong:.0%} wrong"
        out = folder / f"{outfits}-{100 * wrong:.0f}"
        figures = build_data_set(
            [folder / "source" / "booru"],
            out,
            rules=load_rules(None),
            annotators=[
                TruthAnnotator("mask", truth.figures),
                TruthAnnotator("head_box", truth.figures),
                TruthAnnotator("answer", truth.figures, wrong),
            ],
            outfits=outfits,  # type: ignore[arg-type]
            cache=folder / "cache",
        )
        if not result:
            result["pictures"] = compare_faults(truth, out, figures)
        result[name] = compare_clusters(truth, out)
    return result


def compare_faults(truth: Truth, out: Path, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Whether every post is accounted for, and what was kept of each kind of fault."""
    kept = [truth.rows[digest] for digest in open_data_set(out).index["sha256"].to_pylist()]
    originals = Counter(row["id"] if row["copy_of"] is None else row["copy_of"] for row in kept)
    by_kind = Counter(row["kind"] for row in kept)
    keepable = truth.find_keepable()
    return {
        "seen": figures["seen"],
        "kept": figures["kept"],
        "rejected": figures["rejected"],
        "accounted for": figures["seen"] == figures["kept"] + sum(figures["rejected"].values()),
        "keepable": len(keepable),
        "keepable and kept, as it is or as a copy": len(keepable.keys() & originals.keys()),
        "kept twice": sum(number - 1 for number in originals.values()),
        "faulty and kept": {
            kind: number for kind, number in by_kind.items() if kind not in (PLAIN, *COPIES)
        },
    }


def compare_clusters(truth: Truth, out: Path) -> dict[str, dict[str, float]]:
    """Pairwise precision and recall of the characters, the artists and the outfits."""
    kept: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
    for row in open_data_set(out).index.to_pylist():
        true = truth.rows[row["sha256"]]
        kept.setdefault(true["id"] if true["copy_of"] is None else true["copy_of"], (row, true))
    found = [label_clusters(row) for row, _ in kept.values()]
    true_labels = [label_clusters(true) for _, true in kept.values()]
    wanted = [label_clusters(row) for row in truth.find_keepable().values()]
    return {
        name: score_pairs(
            *([labels[name] for labels in rows] for rows in (found, true_labels, wanted))
        )
        for name in ("character", "artist", "outfit")
    }


def label_clusters(row: Mapping[str, Any]) -> dict[str, Hashable]:
    """A row's clusters by name; None where the row belongs to none."""
    character, artist, outfit = row["character"], row["artist"], row["outfit"]
    unknown = artist is None or outfit < 0
    return {
        "character": character,
        "artist": artist,
        "outfit": None if unknown else (character, artist, outfit),
    }


def score_pairs(
    found: Sequence[Hashable], true: Sequence[Hashable], wanted: Sequence[Hashable]
) -> dict[str, float]:
    """Pairwise precision and recall.

    found, true: labels of the pictures that were kept; a picture with None is alone. wanted: true
    labels of all pictures that should have been.
    """
    known = [(one, other) for one, other in zip(found, true) if one is not None]
    right = _count_pairs(known)
    made, there = _count_pairs([one for one, _ in known]), _count_pairs(wanted)
    return {
        "precision": round(right / made, 4) if made else 1.0,
        "recall": round(right / there, 4) if there else 1.0,
    }


def _count_pairs(labels: Sequence[Hashable]) -> int:
    return sum(number * (number - 1) // 2 for number in Counter(labels).values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m retrieval_core.paperdoll.measure_booru", description=__doc__
    )
    parser.add_argument("--count", type=int, default=20000, help="posts of the booru")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other characters")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    options = parser.parse_args(arguments)
    try:
        if options.count < 1:
            raise RetrievalError(f"A booru of {options.count} posts is empty; give 1 or more.")
        with tempfile.TemporaryDirectory() as work:
            result = {
                "posts": options.count,
                "seed": options.seed,
                "outfits in colours of their own": measure_booru(
                    Path(work, "own"), options.count, options.seed, 0.0
                ),
                f"{ALIKE:.0%} of outfits in the colours of another": measure_booru(
                    Path(work, "alike"), options.count, options.seed, ALIKE
                ),
            }
    except RetrievalError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(result, indent=None if options.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
