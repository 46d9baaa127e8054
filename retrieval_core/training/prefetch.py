"""Batches prepared ahead on a thread; which batch a step gets does not change."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Prefetcher:
    """Context manager over `batches.batch(step)` for the steps first .. end - 1, in order.

    ahead: batches in preparation at one time; 0 makes each when it is asked for. An exception
    of `batch` is raised when its step asks for it.
    """

    def __init__(self, batches: Any, first: int, end: int, ahead: int) -> None:
        self._batches, self._next, self._end, self._ahead = batches, first, end, ahead
        self._waiting: deque[Future] = deque()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Prefetcher:
        if self._ahead > 0:
            # One thread: `batch` need not be safe to call twice at a time.
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
            self._fill()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def batch(self, step: int) -> Any:
        """The batch of `step`; steps must be asked for in order."""
        if self._pool is None:
            return self._batches.batch(step)
        batch = self._waiting.popleft().result()
        self._fill()
        return batch

    def _fill(self) -> None:
        while len(self._waiting) < self._ahead and self._next < self._end:
            self._waiting.append(self._pool.submit(self._batches.batch, self._next))
            self._next += 1
