"""Lays pictures out on a labelled PNG sheet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .files import atomic_write

PAPER, INK, FAINT = (250, 249, 246), (40, 38, 48), (128, 124, 136)
TILE, GAP, MARGIN, HEAD, CAPTION = 144, 10, 24, 84, 24

# One colour a reference, in the map and as its frame.
REFERENCE_COLOURS = (
    (0.90, 0.24, 0.24),
    (0.20, 0.48, 0.92),
    (0.96, 0.66, 0.10),
    (0.20, 0.66, 0.36),
    (0.62, 0.32, 0.80),
    (0.10, 0.68, 0.72),
    (0.88, 0.42, 0.66),
    (0.52, 0.42, 0.30),
)


def choose_colour(index: int) -> tuple[float, float, float]:
    return REFERENCE_COLOURS[index % len(REFERENCE_COLOURS)]


@dataclass(frozen=True, eq=False)
class Tile:
    """A picture [3, H, W] in 0..1 with a caption below and, optionally, a frame colour."""

    picture: Tensor
    caption: str = ""
    frame: tuple[float, float, float] | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """References on the left, results on the right, a title above them."""

    title: str
    references: Sequence[Tile]
    results: Sequence[Tile]


def write_sheet(path: Path, title: str, subtitle: str, rows: Sequence[Row]) -> None:
    """Draws the rows below one another and writes the PNG atomically.

    Raises:
        RetrievalError: the folder cannot be written.
    """
    left = max(len(row.references) for row in rows)
    right = max(len(row.results) for row in rows)
    step, row_height = TILE + GAP, TILE + 2 * CAPTION + GAP
    width = 2 * MARGIN + (left + right) * step + 3 * GAP
    sheet = Image.new("RGB", (width, HEAD + len(rows) * row_height + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 18), title, INK, font=ImageFont.load_default(24))
    pen.text((MARGIN, 52), subtitle, FAINT, font=ImageFont.load_default(15))
    for i, row in enumerate(rows):
        top = HEAD + i * row_height
        pen.text((MARGIN, top), row.title, INK, font=ImageFont.load_default(15))
        results_left = MARGIN + left * step + 3 * GAP
        pen.line(
            (results_left - 2 * GAP, top + CAPTION, results_left - 2 * GAP, top + CAPTION + TILE),
            fill=FAINT,
        )
        for tiles, start in ((row.references, MARGIN), (row.results, results_left)):
            for j, tile in enumerate(tiles):
                _paste(sheet, pen, tile, start + j * step, top + CAPTION)
    data = io.BytesIO()
    sheet.save(data, "PNG", optimize=True)
    atomic_write(path, lambda temporary: _write(temporary, data.getvalue()))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _paste(sheet: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, x: int, y: int) -> None:
    pixels = (tile.picture.clamp(0, 1).movedim(0, -1).cpu().numpy() * 255).round()
    picture = Image.fromarray(pixels.astype(np.uint8))
    small = max(picture.size) < TILE
    resampling = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    sheet.paste(picture.resize((TILE, TILE), resampling), (x, y))
    if tile.frame is not None:
        colour = tuple(round(255 * c) for c in tile.frame)
        pen.rectangle((x - 3, y - 3, x + TILE + 2, y + TILE + 2), outline=colour, width=3)
    pen.text((x, y + TILE + 4), tile.caption, FAINT, font=ImageFont.load_default(13))
