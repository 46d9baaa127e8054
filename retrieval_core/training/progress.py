"""Progress of training: a bar on a terminal, elsewhere a line every 30 seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Context manager around the steps first .. end - 1."""

    def __init__(self, label: str, first: int, end: int) -> None:
        self.label, self.first, self.end = label, first, end
        self._bar = tqdm(total=end, initial=first, desc=label, unit="step", disable=None)
        self._smooth: float | None = None
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, step: int, losses: Mapping[str, float], skipped: int) -> None:
        """Shows that `step` steps are done; losses: of the last one."""
        loss = losses["loss"]
        if loss == loss:  # a NaN would stay in the average
            self._smooth = loss if self._smooth is None else 0.98 * self._smooth + 0.02 * loss
        text = "loss -" if self._smooth is None else f"loss {self._smooth:.4f}"
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
