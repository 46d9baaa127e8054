"""Settings of a run of `Trainer`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ..errors import RetrievalError
from ..training.settings import scale_learning_rate

Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of the optimisation, fixed for a run.

    steps: optimiser steps in all; the cosine decay ends there, at 0.
    batch_size: items per step, as the caller's batches have; stored so that a resume checks it.
    learning_rate: highest rate, reached after `warmup_steps` steps of linear warm-up.
    weight_decay: AdamW's, on parameters of two or more dimensions (not biases and norms).
    betas: AdamW's. clip_norm: largest gradient norm. ema_decay: 0 to below 1.
    precision: of the forward pass's products; parameters, optimiser and sums stay in float32.
    seed: of all randomness of the run. checkpoint_every: steps between checkpoints.

    Raises RetrievalError naming the first setting of a user that is out of range.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    precision: Precision = "float32"
    seed: int = 0
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("steps", self.steps >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "a finite number above 0"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to below 2**63"),
        ):
            if not good:
                raise RetrievalError(
                    f"The training setting {name} is {getattr(self, name)}; it must be {wanted}."
                )

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step `step`; see `scale_learning_rate`."""
        return self.learning_rate * scale_learning_rate(step, self.steps, self.warmup_steps)

    def as_json(self) -> dict[str, Any]:
        """All settings as plain JSON values."""
        return {**asdict(self), "betas": list(self.betas)}
