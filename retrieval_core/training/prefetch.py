"""Prepares batches ahead on a thread; which batch a step gets does not change."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any

AHEAD = 2  # batches


@contextmanager
def prefetch_batches(batch: Callable[[int], Any], first: int, end: int) -> Iterator[Iterator[Any]]:
    """Gives an iterator over `batch(step)` for the steps first .. end - 1.

    An exception of `batch` is raised when the iterator reaches its step.
    """
    # One thread: `batch` need not be safe to call concurrently.
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    futures = (pool.submit(batch, step) for step in range(first, end))

    def iterate() -> Iterator[Any]:
        waiting = deque(islice(futures, AHEAD))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(islice(futures, 1))
            yield result

    try:
        yield iterate()
    finally:
        pool.shutdown(cancel_futures=True)
