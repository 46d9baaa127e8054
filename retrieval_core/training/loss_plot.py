"""The history of a run as `losses.csv` and `losses.png`, drawn with PIL alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..files import atomic_write

_COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14))
_NOT_DRAWN = ("learning_rate", "grad_norm")
_SIZE, _LEFT, _TOP, _RIGHT, _BOTTOM = (960, 540), 80, 30, 20, 40


def write_losses(folder: Path, history: Mapping[str, Sequence[float]]) -> None:
    """Write both files; history: name -> one value per step. Nothing for an empty history.

    Raises RetrievalError if the folder cannot be written.
    """
    if not history or not len(next(iter(history.values()))):
        return
    atomic_write(folder / "losses.csv", lambda path: _write_csv(path, history))
    atomic_write(folder / "losses.png", lambda path: plot(history).save(path, format="PNG"))


def _write_csv(path: Path, history: Mapping[str, Sequence[float]]) -> None:
    names = list(history)
    lines = [",".join(["step", *names])]
    for step, row in enumerate(zip(*history.values()), start=1):
        lines.append(",".join([str(step), *("" if v != v else f"{v:.9g}" for v in row)]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot(history: Mapping[str, Sequence[float]]) -> Image.Image:
    """Losses over steps on a logarithmic axis, each smoothed to about 300 points."""
    image = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(image)
    names = [name for name in history if name not in _NOT_DRAWN]
    curves = {name: _binned(np.asarray(history[name], dtype=np.float64)) for name in names}
    heights = np.concatenate([ys for _, ys in curves.values()] or [np.empty(0)])
    if not heights.size:
        draw.text((_LEFT, _TOP), "no finite loss yet", fill="black")
        return image
    low, high = math.log10(heights.min()), math.log10(heights.max())
    if high - low < 1e-6:
        low, high = low - 0.05, high + 0.05
    steps = max(len(history[name]) for name in names)
    x0, y0, x1, y1 = _LEFT, _TOP, _SIZE[0] - _RIGHT, _SIZE[1] - _BOTTOM

    def place(step: float, loss: float) -> tuple[float, float]:
        across = (step - 1) / max(steps - 1, 1)
        up = (math.log10(loss) - low) / (high - low)
        return x0 + across * (x1 - x0), y1 - up * (y1 - y0)

    for share in np.linspace(0, 1, 6):
        loss = 10 ** (low + share * (high - low))
        height = place(1, loss)[1]
        draw.line([(x0, height), (x1, height)], fill=(225, 225, 225))
        draw.text((8, height - 6), f"{loss:.3g}", fill="black")
        step = round(1 + share * (steps - 1))
        draw.text((place(step, loss)[0] - 12, y1 + 8), str(step), fill="black")
    draw.rectangle([x0, y0, x1, y1], outline=(120, 120, 120))
    for index, (name, (xs, ys)) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        points = [place(x, y) for x, y in zip(xs, ys)]
        if len(points) > 1:
            draw.line(points, fill=colour, width=2)
        elif points:
            x, y = points[0]
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour)
        draw.text((x0 + 10 + 160 * index, 8), name, fill=colour)
    draw.text(((x0 + x1) // 2 - 12, y1 + 22), "step", fill="black")
    return image


def _binned(values: np.ndarray, bins: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Steps (from 1) and means of the positive finite values, in at most `bins` groups."""
    steps = np.arange(1, len(values) + 1)
    good = np.isfinite(values) & (values > 0)
    steps, values = steps[good], values[good]
    if not len(steps):
        return steps, values
    groups = np.array_split(np.arange(len(steps)), min(bins, len(steps)))
    return (
        np.array([steps[group].mean() for group in groups]),
        np.array([values[group].mean() for group in groups]),
    )
