"""Pictures as 8-bit images, and labelled PNG sheets of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .files import atomic_write

PAPER, INK, FAINT = (250, 249, 246), (40, 38, 48), (128, 124, 136)
TILE, GAP, MARGIN, HEAD, CAPTION = 144, 10, 24, 84, 24

# One colour per reference, in the map and as its frame.
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


def convert_to_pil(picture: Tensor) -> Image.Image:
    """A picture [3, H, W] in 0..1, rounded to 8 bits."""
    pixels = (picture.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(pixels.movedim(0, -1).contiguous().numpy())


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
    """Writes `draw_sheet`'s picture as PNG, atomically.

    Raises:
        RetrievalError: the folder cannot be written.
    """
    save_png(path, draw_sheet(title, subtitle, rows))


def save_png(path: Path, picture: Image.Image) -> None:
    """Writes a picture atomically; RetrievalError if the folder cannot be written."""
    atomic_write(path, lambda temporary: picture.save(temporary, "PNG", optimize=True))


def draw_sheet(title: str, subtitle: str, rows: Sequence[Row]) -> Image.Image:
    """The rows, one below the other, under a title."""
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
        if row.references:
            middle = results_left - 2 * GAP
            pen.line((middle, top + CAPTION, middle, top + CAPTION + TILE), fill=FAINT)
        for tiles, start in ((row.references, MARGIN), (row.results, results_left)):
            for j, tile in enumerate(tiles):
                _paste(sheet, pen, tile, start + j * step, top + CAPTION)
    return sheet


def _paste(sheet: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, x: int, y: int) -> None:
    picture = convert_to_pil(tile.picture)
    small = max(picture.size) < TILE
    resampling = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    sheet.paste(picture.resize((TILE, TILE), resampling), (x, y))
    if tile.frame is not None:
        colour = tuple(round(255 * c) for c in tile.frame)
        pen.rectangle((x - 3, y - 3, x + TILE + 2, y + TILE + 2), outline=colour, width=3)
    pen.text((x, y + TILE + 4), tile.caption, FAINT, font=ImageFont.load_default(13))
