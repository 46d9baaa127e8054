"""The plot of §5.2: similarity to the references against following the text, a curve a method.

Drawn with PIL, which the pack needs anyway; a method's curve runs over its weight, so that the
better method is the one whose curve lies further to the upper right.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..files import atomic_write
from ..metrics import Estimate
from ..sheets import FAINT, INK, PAPER, REFERENCE_COLOURS
from .protocol import HELD_OUT, IN_DOMAIN
from .scores import Scorer
from .summary import Line

_PANEL, _LEFT, _TOP, _RIGHT, _BOTTOM = (560, 520), 74, 96, 24, 62
_GRID = (226, 224, 218)


def write_frontier(path: Path, lines: Sequence[Line], scorer: Scorer) -> None:
    """Writes the PNG atomically, one panel for each kind of characters."""
    image = plot(lines, scorer)
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    atomic_write(path, lambda temporary: _write(temporary, data.getvalue()))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def plot(lines: Sequence[Line], scorer: Scorer) -> Image.Image:
    """One panel a domain on common axes; bars are standard errors, labels the weights."""
    drawn = [ln for ln in lines if {scorer.similarity, scorer.text} <= ln.scores.keys()]
    domains = [d for d in (IN_DOMAIN, HELD_OUT) if any(ln.domain == d for ln in drawn)]
    width, height = _PANEL
    image = Image.new("RGB", (width * max(1, len(domains)), height), PAPER)
    pen = ImageDraw.Draw(image)
    if not drawn:
        pen.text((_LEFT, _TOP), "nothing measured yet", INK, font=_font(16))
        return image
    methods = list(dict.fromkeys(line.method for line in drawn))
    across = _axis([line.scores[scorer.text] for line in drawn])
    up = _axis([line.scores[scorer.similarity] for line in drawn])
    for i, domain in enumerate(domains):
        own = [line for line in drawn if line.domain == domain]
        _panel(pen, i * width, domain, own, methods, scorer, across, up)
    return image


def _panel(
    pen: ImageDraw.ImageDraw,
    left: int,
    domain: str,
    lines: Sequence[Line],
    methods: Sequence[str],
    scorer: Scorer,
    across: tuple[float, float, float],
    up: tuple[float, float, float],
) -> None:
    x0, y0 = left + _LEFT, _TOP
    x1, y1 = left + _PANEL[0] - _RIGHT, _PANEL[1] - _BOTTOM

    def place(text: float, similarity: float) -> tuple[float, float]:
        x = x0 + (text - across[0]) / (across[1] - across[0]) * (x1 - x0)
        y = y1 - (similarity - up[0]) / (up[1] - up[0]) * (y1 - y0)
        return x, y

    pen.text((x0, 14), f"{domain} characters", INK, font=_font(20))
    for value in _ticks(across):
        x = place(value, up[0])[0]
        pen.line((x, y0, x, y1), fill=_GRID)
        pen.text((x, y1 + 8), f"{value:g}", FAINT, font=_font(13), anchor="mt")
    for value in _ticks(up):
        y = place(across[0], value)[1]
        pen.line((x0, y, x1, y), fill=_GRID)
        pen.text((x0 - 8, y), f"{value:g}", FAINT, font=_font(13), anchor="rm")
    pen.rectangle((x0, y0, x1, y1), outline=FAINT)
    pen.text(((x0 + x1) // 2, y1 + 32), f"{scorer.text}, %", INK, font=_font(15), anchor="mt")
    pen.text((x0, y0 - 20), f"{scorer.similarity}, %", INK, font=_font(15), anchor="lm")
    legend = float(x0)
    for method in methods:
        colour = _colour(methods.index(method))
        own = [line for line in lines if line.method == method]
        if not own:
            continue
        pen.ellipse((legend, 50, legend + 10, 60), fill=colour)
        pen.text((legend + 16, 55), method, INK, font=_font(14), anchor="lm")
        legend += 34 + pen.textlength(method, font=_font(14))
        points = [(line.scores[scorer.text], line.scores[scorer.similarity]) for line in own]
        places = [place(text.mean, similarity.mean) for text, similarity in points]
        if len(places) > 1:
            pen.line(places, fill=colour, width=2)
        for line, (text, similarity), (x, y) in zip(own, points, places):
            for end in (-1, 1):
                reach = place(
                    text.mean + end * _error(text), similarity.mean + end * _error(similarity)
                )
                pen.line((x, y, reach[0], y), fill=colour)
                pen.line((x, y, x, reach[1]), fill=colour)
            base = line.weight == 0
            pen.ellipse(
                (x - 4, y - 4, x + 4, y + 4), fill=PAPER if base else colour, outline=colour
            )
            if line.weight is not None:
                label = "no retrieval" if base else f"{line.weight:g}"
                # On the inner side, where the label cannot leave the panel.
                inner = x < (x0 + x1) / 2
                at = (x + 7, y + 3) if inner else (x - 7, y + 3)
                pen.text(at, label, INK, font=_font(13), anchor="lt" if inner else "rt")


def _axis(estimates: Sequence[Estimate]) -> tuple[float, float, float]:
    """Lowest value, highest value and distance of ticks, with room for the error bars."""
    low = min(e.mean - _error(e) for e in estimates)
    high = max(e.mean + _error(e) for e in estimates)
    room = max(1.0, 0.08 * (high - low))
    low, high = low - room, min(high + room, max(high, 100.0))  # no percentage lies above 100
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return math.floor(low / step) * step, math.ceil(high / step) * step, step


def _ticks(axis: tuple[float, float, float]) -> list[float]:
    low, high, step = axis
    return [round(low + i * step, 9) for i in range(round((high - low) / step) + 1)]


def _error(estimate: Estimate) -> float:
    return 0.0 if math.isnan(estimate.standard_error) else estimate.standard_error


def _colour(index: int) -> tuple[int, int, int]:
    r, g, b = REFERENCE_COLOURS[index % len(REFERENCE_COLOURS)]
    return round(255 * r), round(255 * g), round(255 * b)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
