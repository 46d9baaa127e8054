"""Results in words, and distances as a picture."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .diversity import Pair, compute_distance_matrix
from .vqa import QuestionResult, VQADiversity

MOST_SHOWN = 256
PLOT, MARGIN, BAR = 512, 48, 20
# Dark for alike, light for different: viridis at even steps.
COLOURS = (
    (68, 1, 84),
    (59, 82, 139),
    (33, 145, 140),
    (94, 201, 98),
    (253, 231, 37),
)


def write_report(result: VQADiversity) -> str:
    """Score, most and least alike pair, and every answer, as lines of text."""
    count = result.score.count
    lines = [f"VQA diversity: {result.score} % ({count} images, {len(result.questions)} questions)"]
    if result.weighted is not None:
        lines.append(f"weighted by similarity: {result.weighted} %")
    lines += _pairs(result)
    for question in result.questions:
        weighted = "" if question.weighted is None else f", weighted {question.weighted} %"
        lines += ["", f"{question.question} {question.score} %{weighted}"]
        lines += _pairs(question)
        lines += [f"{number}: {answer}" for number, answer in enumerate(question.answers, 1)]
    return "\n".join(lines)


def _pairs(result: VQADiversity | QuestionResult) -> list[str]:
    most, least = result.extremes()
    return [f"most alike: {_pair(most)}; least alike: {_pair(least)}"]


def _pair(pair: Pair) -> str:
    return f"images {pair.first + 1} and {pair.second + 1} ({pair.distance:.2f} %)"


def plot_distances(result: VQADiversity) -> np.ndarray:
    """The matrix of mean cosine distances as a heat map, float32 [H, W, 3] in 0..1.

    The colours run from 0 to the largest distance. Frames: the most alike pair in white, the least
    alike in red. Of more than `MOST_SHOWN` images the first are shown, and the title says so.
    """
    shown = min(result.score.count, MOST_SHOWN)
    matrix = compute_distance_matrix(result.embeddings[:shown])
    top = float(matrix.max()) or 1.0
    cell = max(1, PLOT // shown)
    side = cell * shown
    sheet = Image.new("RGB", (side + 3 * MARGIN + BAR + 24, side + 2 * MARGIN), "white")
    heat = Image.fromarray(_coloured(matrix / top)).resize((side, side), Image.Resampling.NEAREST)
    sheet.paste(heat, (MARGIN, MARGIN))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    only = "" if shown == result.score.count else f", the first {shown}"
    title = f"VQA diversity {result.score} % of {result.score.count} images{only}"
    pen.text((MARGIN, 14), title, "black", font=ImageFont.load_default(15))
    for number in _ticks(shown):
        middle = MARGIN + (number - 0.5) * cell
        pen.text((MARGIN - 8, middle), str(number), "black", font=font, anchor="rm")
        pen.text((middle, MARGIN + side + 8), str(number), "black", font=font, anchor="mt")
    if shown == result.score.count:
        for pair, colour in zip(result.extremes(), ("white", "red")):
            for row, column in ((pair.first, pair.second), (pair.second, pair.first)):
                x, y = MARGIN + column * cell, MARGIN + row * cell
                pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline=colour, width=2)
    _legend(sheet, pen, side, top, font)
    return np.asarray(sheet, np.float32) / 255


def _ticks(count: int) -> list[int]:
    step = max(1, -(-count // 16))
    return list(range(1, count + 1, step))


def _legend(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    side: int,
    top: float,
    font: ImageFont.FreeTypeFont,
) -> None:
    x = MARGIN + side + 20
    ramp = np.linspace(1, 0, side)[:, None].repeat(BAR, 1)
    sheet.paste(Image.fromarray(_coloured(ramp)), (x, MARGIN))
    for share in (0, 0.5, 1):
        y = MARGIN + (1 - share) * side
        text = f"{share * top:.1f} %"
        pen.text((x + BAR + 6, y), text, "black", font=font, anchor="lm")


def _coloured(values: np.ndarray) -> np.ndarray:
    """Values in 0..1 to uint8 colours [..., 3]."""
    stops = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(values, stops, channel) for channel in zip(*COLOURS)]
    return np.stack(channels, -1).round().astype(np.uint8)
