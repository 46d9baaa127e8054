"""How a run is shown, and how it is stopped: on a terminal, or by a host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from .interruption import Interruption
from .progress import Progress


class Watcher(Protocol):
    """Is told how a run goes, and says whether it is to stop."""

    def show_caching(self, done: int, total: int) -> None:
        """Shards of latents and prompts that are computed."""

    def follow(self, step: int, steps: int) -> AbstractContextManager[None]:
        """The context of the loop, from `step` steps done to `steps`."""

    @property
    def wants_stop(self) -> bool:
        """Whether the run is to be saved and left after the current step."""

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        """`step` steps are done; losses: of the last one."""

    def show_sheet(self, path: Path) -> None:
        """A new sheet of samples."""


class Terminal:
    """A `Watcher` with bars on a terminal, which Ctrl-C and SIGTERM stop.

    shown: whether this process is the one that prints.
    """

    def __init__(self, label: str, shown: bool) -> None:
        self.label, self.shown = label, shown
        self._caching: tqdm | None = None

    def show_caching(self, done: int, total: int) -> None:
        if self._caching is None:
            disable = None if self.shown else True  # None: off without a terminal
            words = "latents and prompts"
            self._caching = tqdm(total=total, desc=words, unit="shard", disable=disable)
        self._caching.update(done - self._caching.n)
        if done == total:
            self._caching.close()

    @contextmanager
    def follow(self, step: int, steps: int) -> Iterator[None]:
        with (
            Interruption() as self._interruption,
            Progress(self.label, step, steps, self.shown) as self._progress,
        ):
            yield

    @property
    def wants_stop(self) -> bool:
        return self._interruption.requested

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        self._progress.update(step, losses, 0)

    def show_sheet(self, path: Path) -> None:
        """It lies in the run's folder."""
