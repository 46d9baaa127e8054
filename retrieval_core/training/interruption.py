"""Turns Ctrl-C and termination signals into a request to stop after the current step."""

from __future__ import annotations

import signal
import sys
from types import FrameType


class Interruption:
    """Context manager; `requested` becomes True on SIGINT or SIGTERM.

    A second SIGINT raises KeyboardInterrupt at once. For the main thread, as Python's signals are.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        print("\nStopping after this step and saving ...", file=sys.stderr, flush=True)
