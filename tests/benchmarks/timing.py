"""Interleaved timing, so that a slow minute of the machine affects all variants alike."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median

import torch

BASE = "base model"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class Sample:
    """One step: its duration and the process's (or the GPU's) highest memory while it ran."""

    seconds: float
    peak_bytes: int


@dataclass
class Series:
    """All steps of one variant, and each one's ratio to the base steps before and after it."""

    samples: list[Sample] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return median(s.seconds for s in self.samples)

    @property
    def peak_bytes(self) -> int:
        return max(s.peak_bytes for s in self.samples)

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        return min(self.ratios), max(self.ratios)


def sequence(names: Sequence[str]) -> list[str]:
    """One round: the base model before, after, and between every two variants."""
    order = [BASE]
    for start in range(0, len(names), 2):
        order += [*names[start : start + 2], BASE]
    return order


def interleave(
    names: Sequence[str],
    step: Callable[[str], Sample],
    rounds: int,
    on_step: Callable[[str, int, int], None] | None = None,
) -> dict[str, Series]:
    """Runs `step(name)` over `rounds` rounds of `sequence(names)`.

    A variant's ratio is its duration over the mean of the base model's before it and after it.
    """
    series = {name: Series() for name in (BASE, *names)}
    order = sequence(names)
    total = rounds * len(order)
    for turn in range(rounds):
        taken: list[tuple[str, Sample]] = []
        for name in order:
            taken.append((name, step(name)))
            if on_step is not None:
                on_step(name, turn * len(order) + len(taken), total)
        bases = [i for i, (name, _) in enumerate(taken) if name == BASE]
        for i, (name, sample) in enumerate(taken):
            series[name].samples.append(sample)
            before = max((b for b in bases if b < i), default=bases[0])
            after = min((b for b in bases if b > i), default=bases[-1])
            if name == BASE:  # its ratio shows the machine's drift
                before, after = bases[0], bases[-1]
            around = (taken[before][1].seconds + taken[after][1].seconds) / 2
            series[name].ratios.append(sample.seconds / around)
    return series


def keep_heap() -> None:
    """Tells glibc not to return freed memory to the system.

    By default it trims the heap's end when much of it is free. Whether a step frees that much there
    depends on a run's first allocations, and makes steps up to 8 % longer for the whole run.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 32 << 20)


def timed(work: Callable[[], object], device: torch.device) -> Sample:
    """One call of `work`: device events and the allocator's peak on CUDA, the wall clock and the
    process's resident memory elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return Sample(start.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated(device))
    with _ResidentMemory() as memory:
        begun = time.perf_counter()
        work()
        if device.type == "mps":
            torch.mps.synchronize()
        seconds = time.perf_counter() - begun
    return Sample(seconds, memory.peak)


class _ResidentMemory:
    """The process's highest resident memory, sampled every 10 ms; psutil comes with the host."""

    def __init__(self) -> None:
        import psutil

        self.process, self.peak = psutil.Process(), 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __enter__(self) -> _ResidentMemory:
        self.peak = self.process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self.process.memory_info().rss)
