"""The paper-doll world's backgrounds: eight motifs, each in seeded variants."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from .world import BACKGROUNDS, SIZE, Colour


@lru_cache(maxsize=1024)
def draw_background(name: str, seed: int) -> Image.Image:
    """RGB image of 64x64 pixels; deterministic. It is cached: callers must not draw on it."""
    index = BACKGROUNDS.index(name)
    rng = np.random.default_rng([index, seed])
    picture = Image.new("RGB", (SIZE, SIZE))
    pen = ImageDraw.Draw(picture)
    _MOTIFS[index](pen, rng)
    return picture


def _gradient(pen: ImageDraw.ImageDraw, top: Colour, bottom: Colour, y0: int, y1: int) -> None:
    for y in range(y0, y1):
        share = (y - y0) / max(1, y1 - 1 - y0)
        colour = tuple(round(a + (b - a) * share) for a, b in zip(top, bottom))
        pen.line((0, y, SIZE, y), fill=colour)


def _studio(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    grey = 176 + int(rng.integers(-8, 9))
    _gradient(pen, (grey, grey, grey + 6), (grey + 24, grey + 24, grey + 28), 0, SIZE)


def _sky(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    _gradient(pen, (96, 176, 246), (196, 230, 252), 0, SIZE)
    for _ in range(3):
        x, y = int(rng.integers(0, SIZE)), int(rng.integers(4, 56))
        for dx, dy, r in ((-5, 1, 4), (0, -1, 5), (6, 1, 4)):
            pen.ellipse((x + dx - r - 2, y + dy - r, x + dx + r + 2, y + dy + r), fill="white")


def _beach(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    sea, sand = 20 + int(rng.integers(-2, 3)), 38 + int(rng.integers(-2, 3))
    _gradient(pen, (150, 216, 246), (210, 240, 250), 0, sea)
    _gradient(pen, (24, 120, 190), (60, 190, 210), sea, sand)
    _gradient(pen, (246, 222, 160), (230, 196, 128), sand, SIZE)


def _forest(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    _gradient(pen, (150, 200, 140), (190, 220, 150), 0, 40)
    _gradient(pen, (70, 130, 60), (50, 104, 46), 40, SIZE)
    for x in (4, 19, 45, 60):
        x += int(rng.integers(-3, 4))
        pen.rectangle((x - 2, 20, x + 2, 48), fill=(92, 62, 40))
        r = 9 + int(rng.integers(0, 3))
        pen.ellipse((x - r, 14 - r, x + r, 14 + r), fill=(30, 96 + int(rng.integers(0, 20)), 44))


def _city(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    _gradient(pen, (190, 204, 214), (220, 224, 226), 0, SIZE)
    for x in range(0, SIZE, 13):
        top = int(rng.integers(6, 28))
        shade = int(rng.integers(0, 24))
        pen.rectangle((x, top, x + 11, 54), fill=(96 + shade, 104 + shade, 118 + shade))
        for wy in range(top + 3, 52, 6):
            for wx in (x + 2, x + 7):
                pen.rectangle((wx, wy, wx + 2, wy + 2), fill=(250, 236, 170))
    pen.rectangle((0, 54, SIZE, SIZE), fill=(88, 88, 92))


def _night(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    _gradient(pen, (8, 10, 42), (34, 38, 92), 0, SIZE)
    for x, y in rng.integers(0, SIZE, (16, 2)).tolist():
        pen.rectangle((x, y, x + 1, y), fill=(250, 250, 220))
    x = 9 if rng.random() < 0.5 else 55
    pen.ellipse((x - 6, 3, x + 6, 15), fill=(250, 244, 200))


def _room(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    pen.rectangle((0, 0, SIZE, 46), fill=(240, 220, 200))
    pen.rectangle((0, 46, SIZE, SIZE), fill=(158, 104, 62))
    for y in (51, 57):
        pen.line((0, y, SIZE, y), fill=(132, 84, 48))
    x = (3 if rng.random() < 0.5 else 45) + int(rng.integers(-1, 3))
    pen.rectangle((x, 8, x + 14, 26), fill=(120, 80, 60))
    pen.rectangle((x + 2, 10, x + 12, 24), fill=(170, 220, 250))
    pen.line((x + 7, 10, x + 7, 24), fill=(120, 80, 60))


def _sunset(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    _gradient(pen, (92, 40, 120), (250, 130, 70), 0, 44)
    x = int(rng.integers(6, 58))
    pen.ellipse((x - 8, 32, x + 8, 48), fill=(255, 226, 110))
    _gradient(pen, (120, 50, 80), (60, 24, 60), 44, SIZE)


_MOTIFS = (_studio, _sky, _beach, _forest, _city, _night, _room, _sunset)  # as BACKGROUNDS
