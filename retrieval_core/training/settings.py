"""The lock settings (§5.4), and the learning rate over the steps."""

from __future__ import annotations

import math
from typing import Literal, get_args

Lock = Literal["train_both", "lock_decoder", "lock_both"]
LOCKS: tuple[str, ...] = get_args(Lock)


def scale_learning_rate(step: int, steps: int, warmup_steps: int) -> float:
    """Factor of the learning rate at step `step` (0 is the first): linear warm-up, then a cosine
    that ends at 0 after `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))
