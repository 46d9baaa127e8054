"""Prepares batches ahead on a thread; which batch a step gets does not change."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

AHEAD = 2  # batches


def prefetch_batches(
    batch: Callable[[int], Any], first: int, end: int
) -> Generator[Any, None, None]:
    """Yields `batch(step)` for the steps first .. end - 1; closing it ends the thread.

    An exception of `batch` is raised when the iterator reaches its step.
    """
    # One thread: `batch` need not be safe to call concurrently.
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    futures = (pool.submit(batch, step) for step in range(first, end))
    waiting = deque(islice(futures, AHEAD))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(islice(futures, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
