"""The plot of §5.2: similarity to the references against following the text, a curve a method.

A method's curve runs over its weight, so that the better method is the one whose curve lies
further to the upper right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files import atomic_write
from ..sheets import choose_colour
from .protocol import HELD_OUT, IN_DOMAIN
from .scores import Scorer
from .summary import Line

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_frontier(path: Path, lines: Sequence[Line], scorer: Scorer) -> None:
    """Writes the plot as a PNG atomically; equal lines give equal bytes."""
    figure = draw_frontier(lines, scorer)
    plain = {"Software": None}
    atomic_write(path, lambda file: figure.savefig(file, format="png", metadata=plain))


def draw_frontier(lines: Sequence[Line], scorer: Scorer) -> Figure:
    """One panel a domain on common axes; bars are standard errors, labels the weights."""
    from matplotlib.figure import Figure

    drawn = [ln for ln in lines if {scorer.similarity, scorer.text} <= ln.scores.keys()]
    domains = [d for d in (IN_DOMAIN, HELD_OUT) if any(ln.domain == d for ln in drawn)]
    figure = Figure((5.6 * max(1, len(domains)), 5.2), dpi=100, layout="constrained")
    if not drawn:
        figure.text(0.1, 0.8, "nothing measured yet")
        return figure
    methods = list(dict.fromkeys(line.method for line in drawn))
    panels = figure.subplots(1, len(domains), sharex=True, sharey=True, squeeze=False)[0]
    for panel, domain in zip(panels, domains):
        panel.set_title(f"{domain} characters")
        panel.set_xlabel(f"{scorer.text}, %")
        panel.set_ylabel(f"{scorer.similarity}, %")
        panel.grid(alpha=0.3)
        panel.margins(x=0.2)  # for the labels
        for number, method in enumerate(methods):
            own = [ln for ln in drawn if (ln.method, ln.domain) == (method, domain)]
            if not own:
                continue
            text = [line.scores[scorer.text] for line in own]
            similarity = [line.scores[scorer.similarity] for line in own]
            panel.errorbar(
                [estimate.mean for estimate in text],
                [estimate.mean for estimate in similarity],
                xerr=np.nan_to_num([estimate.standard_error for estimate in text]),
                yerr=np.nan_to_num([estimate.standard_error for estimate in similarity]),
                color=choose_colour(number),
                marker="o",
                label=method,
            )
            for line, x, y in zip(own, text, similarity):
                if line.weight is not None:
                    label = "no retrieval" if line.weight == 0 else f"{line.weight:g}"
                    panel.annotate(label, (x.mean, y.mean), (5, 5), textcoords="offset points")
        panel.legend()
    return figure
