"""Progress of training: a bar on a terminal, elsewhere a line every 30 seconds."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Context manager around the steps first .. end - 1; `shown`: not if False."""

    def __init__(self, label: str, first: int, end: int, shown: bool = True) -> None:
        self.label, self.first, self.end, self.shown = label, first, end, shown
        disable = None if shown else True  # None: off without a terminal
        self._bar = tqdm(total=end, initial=first, desc=label, unit="step", disable=disable)
        self._smooth: dict[str, float] = {}
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, step: int, losses: Mapping[str, float], skipped: int) -> None:
        """Shows that `step` steps are done; losses: of the last one."""
        if not self.shown:
            return
        for name, loss in losses.items():
            if math.isfinite(loss):  # a NaN would stay in the average
                self._smooth[name] = 0.98 * self._smooth.get(name, loss) + 0.02 * loss
        text = ", ".join(f"{name} {loss:.4f}" for name, loss in self._smooth.items())
        if skipped:
            text += f", {skipped} skipped"
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._said >= SECONDS_BETWEEN_LINES or step == self.end:
            self._said = now
            speed = (step - self.first) / max(now - self._started, 1e-9)
            left = (self.end - step) / max(speed, 1e-9)
            print(
                f"{self.label}: step {step}/{self.end}, {text}, {speed:.2f} steps/s, "
                f"{left / 60:.1f} min left",
                file=sys.stderr,
                flush=True,
            )
