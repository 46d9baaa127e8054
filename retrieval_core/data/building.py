"""Builds a data set from tagged pictures (§3.1): scan, measure, annotate, cluster, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from .annotating import Annotator

Outfits = Literal["answers", "garments"]
# Called with the stage's name, its chunks done, its chunks in all, rows kept and rows rejected.
Progress = Callable[[str, int, int, int, int], None]


def build_data_set(
    sources: Sequence[Path],
    out: Path,
    *,
    rules: Any,
    annotators: Sequence[Annotator] = (),
    outfits: Outfits = "garments",
    copy: bool = False,
    cache: Path,
    ray: str | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Builds a data set from `sources` in the folder `out`; returns its figures.

    The figures: seen, kept, rejected (reason -> count), where seen = kept + all rejected.
    """
    raise NotImplementedError
