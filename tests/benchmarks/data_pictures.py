"""Speed of measuring pictures, beside Pillow's own decoding, and of the search for copies.

`python -m tests.benchmarks.data_pictures` draws pictures of a booru's size, saves them as JPEG and
PNG and measures them on one core, in turn with decoding alone; then it searches random hashes with
planted copies, in growing numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from retrieval_core.data.duplicates import DISTANCE, find_duplicates
from retrieval_core.data.pictures import measure_picture, measure_pictures

SIZE = (850, 1200)  # width and height of Danbooru's samples
COPIES = 0.1  # share of planted copies
SAVED = {"JPEG": {"quality": 90}, "PNG": {}}


def draw_picture(rng: np.random.Generator) -> Image.Image:
    """Flat shapes with soft edges over a grain, so that files are about as large as drawings'."""
    picture = Image.new("RGB", SIZE, tuple(rng.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(picture)
    for _ in range(150):
        x, y = (rng.random(2) * SIZE).tolist()
        w, h = (rng.random(2) * 300).tolist()
        pen.ellipse((x, y, x + w, y + h), tuple(rng.integers(0, 256, 3).tolist()))
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(1)), np.int16)
    return Image.fromarray((pixels + rng.integers(-3, 4, pixels.shape)).clip(0, 255).astype("u1"))


def decode(content: bytes) -> None:
    with Image.open(io.BytesIO(content)) as image:
        image.load()


def measure_kind(kind: str, count: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Pictures a second, by the median over the rounds, of each step on the same files."""
    rng = np.random.default_rng(0)
    for number in range(count):
        draw_picture(rng).save(folder / f"{number}.{kind.lower()}", kind, **SAVED[kind])
    names = [f"{number}.{kind.lower()}" for number in range(count)]
    contents = [(folder / name).read_bytes() for name in names]
    chunk = {"root": str(folder), "images": names, "first": 0}
    steps: dict[str, Callable[[], object]] = {
        "Pillow decodes": lambda: [decode(content) for content in contents],
        "measured": lambda: [measure_picture(content) for content in contents],
        "whole stage": lambda: measure_pictures(chunk),
        "SHA-256 alone": lambda: [hashlib.sha256(content).digest() for content in contents],
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begun = time.process_time()
            step()
            seconds[name].append(time.process_time() - begun)
    return {
        "kind": kind,
        "KB a file": round(sum(map(len, contents)) / count / 1000),
        **{name: round(count / median(taken), 1) for name, taken in seconds.items()},
    }


def measure_search(count: int) -> dict[str, Any]:
    """Seconds of the search for copies among `count` hashes, and whether it found them all."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (count, 32), np.uint8)
    thumbnails = np.full((count, 8, 8, 3), 128, np.uint8)
    copies = round(COPIES * count)
    flips = np.zeros((copies, 256), np.uint8)
    flips[:, :DISTANCE] = 1
    flips = np.packbits(rng.permuted(flips, axis=1), axis=1)
    hashes[-copies:] = hashes[rng.permutation(count - copies)[:copies]] ^ flips
    begun = time.process_time()
    found = find_duplicates(hashes, thumbnails, np.ones(count, np.int64))
    seconds = time.process_time() - begun
    return {
        "hashes": count,
        "seconds": round(seconds, 2),
        "microseconds a hash": round(1e6 * seconds / count, 1),
        "found": f"{(found >= 0).sum()} of {copies}",
    }


def text(rows: Sequence[dict[str, Any]]) -> str:
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) + 3 for name in rows[0]}
    lines = ["".join(f"{name:>{width}}" for name, width in widths.items())]
    lines += ["".join(f"{row[name]!s:>{width}}" for name, width in widths.items()) for row in rows]
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.data_pictures", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hashes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    options = parser.parse_args(given)
    pictures = []
    for kind in SAVED:
        with tempfile.TemporaryDirectory() as folder:
            pictures.append(measure_kind(kind, options.pictures, options.rounds, Path(folder)))
    searches = [measure_search(count) for count in options.hashes]
    if options.json:
        print(json.dumps({"pictures": pictures, "search": searches}))
        return 0
    print(f"{SIZE[0]} x {SIZE[1]} pixels, pictures a CPU second:\n{text(pictures)}\n")
    print(f"Search for copies within {DISTANCE} bits:\n{text(searches)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
