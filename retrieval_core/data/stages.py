"""Stages of a data set's build: a function over chunks, whose results are Parquet files.

A result is written atomically under a name that is a digest of what it was made from, so that a
build that was killed goes on from the chunks that are done, and gives the same files. Daft runs the
chunks: on this machine's cores, or on a Ray cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

# A chunk is plain JSON; its result is a table of rows kept, and rejected rows by reason.
Function = Callable[[Any], "tuple[pa.Table, dict[str, int]]"]
# Called with chunks done, chunks in all, rows kept and rows rejected.
Progress = Callable[[int, int, int, int], None]


def run_stage(
    name: str,
    function: Function,
    chunks: Sequence[Any],
    folder: Path,
    *,
    settings: Any = None,
    ray: str | None = None,
    on_progress: Progress | None = None,
) -> list[Path]:
    """Runs `function` on each chunk whose result is not in `folder` yet.

    Args:
        name: of the stage, with the version of its code. chunks, settings: plain JSON, of which
            the result's name is a digest. ray: address of a Ray cluster, which sees `folder` and
            the sources under the same paths; None is this machine.

    Returns:
        The results' Parquet files, in the order of the chunks.
    """
    raise NotImplementedError


def read_results(paths: Sequence[Path]) -> tuple[pa.Table, dict[str, int]]:
    """The rows of a stage's results, in order, and the rejected ones by reason."""
    raise NotImplementedError
