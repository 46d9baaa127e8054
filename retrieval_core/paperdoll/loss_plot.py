"""The loss history of a run as `losses.csv` and `losses.png`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..files import atomic_write, write_text

_NOT_DRAWN = ("learning_rate", "grad_norm")
_POINTS = 300  # of a curve, each the mean of the steps around it


def write_losses(folder: Path, history: Mapping[str, Sequence[float]]) -> None:
    """Writes `losses.csv` and `losses.png`.

    history: name -> one value per step, NaN where a step has none.

    Raises RetrievalError if the folder cannot be written.
    """
    from matplotlib.figure import Figure

    lines = [",".join(["step", *history])]
    for step, row in enumerate(zip(*history.values()), start=1):
        lines.append(",".join([str(step), *("" if v != v else f"{v:.9g}" for v in row)]))
    write_text(folder / "losses.csv", "\n".join(lines) + "\n")
    figure = Figure(figsize=(9.6, 5.4))
    axes = figure.subplots()
    for name, values in history.items():
        if name not in _NOT_DRAWN:
            axes.plot(*_average(np.asarray(values)), marker=".", markersize=3, label=name)
    axes.set(xlabel="step", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    atomic_write(folder / "losses.png", lambda path: figure.savefig(path, format="png"))


def _average(values: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean steps (from 1) and mean values of the positive finite values, in `_POINTS` groups."""
    indices = np.flatnonzero(np.isfinite(values) & (values > 0))
    groups = [group for group in np.array_split(indices, _POINTS) if len(group)]
    return [g.mean() + 1 for g in groups], [values[g].mean() for g in groups]
