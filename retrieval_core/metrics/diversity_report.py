"""The VQA diversity result as text, and its distances as an image."""

from __future__ import annotations

import numpy as np

from .diversity import compute_distance_matrix, find_extreme_pairs
from .vqa import VQADiversity

MOST_SHOWN = 256


def write_report(result: VQADiversity) -> str:
    """Score, most and least alike pair, and every answer, as lines of text."""
    count = result.score.count
    lines = [f"VQA diversity: {result.score} % ({count} images, {len(result.questions)} questions)"]
    if result.weighted is not None:
        lines.append(f"weighted by similarity: {result.weighted} %")
    lines.append(_describe_extremes(result.embeddings))
    for question in result.questions:
        weighted = "" if question.weighted is None else f", weighted {question.weighted} %"
        lines += ["", f"{question.question} {question.score} %{weighted}"]
        lines.append(_describe_extremes(question.embeddings))
        lines += [f"{number}: {answer}" for number, answer in enumerate(question.answers, 1)]
    return "\n".join(lines)


def _describe_extremes(embeddings: np.ndarray) -> str:
    most, least = (
        f"images {pair.first + 1} and {pair.second + 1} ({pair.distance:.2f} %)"
        for pair in find_extreme_pairs(embeddings)
    )
    return f"most alike: {most}; least alike: {least}"


def plot_distances(result: VQADiversity) -> np.ndarray:
    """The matrix of mean cosine distances as a heat map, float32 [H, W, 3] in 0..1.

    The colours run from 0 to the largest distance. Frames: the most alike pair in white, the least
    alike in red. Of more than `MOST_SHOWN` images the first are shown, and the title says so.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    count = result.score.count
    shown = min(count, MOST_SHOWN)
    matrix = compute_distance_matrix(result.embeddings[:shown])
    figure = Figure((7, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    end = shown + 0.5  # the cell of image i spans i - 0.5 to i + 0.5
    image = axes.imshow(
        matrix, vmin=0, vmax=matrix.max() or 1, interpolation="nearest", extent=(0.5, end, end, 0.5)
    )
    figure.colorbar(image, format="%.1f %%")
    only = "" if shown == count else f", the first {shown}"
    axes.set_title(f"VQA diversity {result.score} % of {count} images{only}")
    for which in (axes.xaxis, axes.yaxis):
        which.get_major_locator().set_params(integer=True)
    if shown == count:
        for pair, colour in zip(find_extreme_pairs(result.embeddings), ("white", "red")):
            for row, column in ((pair.first, pair.second), (pair.second, pair.first)):
                frame = Rectangle((column + 0.5, row + 0.5), 1, 1, fill=False, edgecolor=colour)
                axes.add_patch(frame)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), np.float32)[..., :3] / 255
