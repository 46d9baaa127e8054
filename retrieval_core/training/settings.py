"""Settings of a training run, and which modules each lock setting trains (§5.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from ..errors import RetrievalError

Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
Lock = Literal["train_both", "lock_decoder", "lock_both"]
LOCKS: tuple[str, ...] = get_args(Lock)

# A setting that only says when something is written: a resumed run may have another value.
_FREE = {"free_to_change": True}


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of the optimisation, fixed for a run.

    steps: optimiser steps in all; the cosine decay ends there.
    batch_size: items per step, as the caller's batches have; stored so that a resume checks it.
    learning_rate: highest rate, reached after `warmup_steps` steps of linear warm-up.
    final_learning_rate_ratio: the cosine ends at this share of `learning_rate`, 0 to 1.
    weight_decay: AdamW's, on parameters of two or more dimensions (not biases and norms).
    betas: AdamW's. clip_norm: largest gradient norm. ema_decay: 0 to below 1.
    precision: of the forward pass's products; parameters, optimiser and sums stay in float32.
    seed: of all randomness of the run. checkpoint_every: steps between checkpoints.

    Raises RetrievalError naming the first setting that is out of range.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    final_learning_rate_ratio: float = 0.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    precision: Precision = "float32"
    seed: int = 0
    checkpoint_every: int = field(default=1000, metadata=_FREE)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every"):
            self._check(name, _is_whole(getattr(self, name), 1), "a whole number of 1 or more")
        for name in ("warmup_steps", "seed"):
            self._check(name, _is_whole(getattr(self, name), 0), "a whole number of 0 or more")
        self._check("seed", self.seed < 2**63, "below 2**63")
        self._check("warmup_steps", self.warmup_steps < self.steps, f"below steps ({self.steps})")
        for name in ("learning_rate", "clip_norm"):
            self._check(name, 0 < getattr(self, name) < math.inf, "a finite number above 0")
        good = 0 <= self.weight_decay < math.inf
        self._check("weight_decay", good, "a finite number of 0 or more")
        good = 0 <= self.final_learning_rate_ratio <= 1
        self._check("final_learning_rate_ratio", good, "0 to 1")
        self._check("ema_decay", 0 <= self.ema_decay < 1, "0 to below 1")
        self._check("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        good = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        self._check("betas", good, "two numbers from 0 to below 1")

    def _check(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            value = getattr(self, name)
            raise RetrievalError(f"The training setting {name} is {value!r}; it must be {wanted}.")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step `step` (0 is the first): linear warm-up, then a cosine."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / (self.steps - self.warmup_steps))
        low = self.final_learning_rate_ratio
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))

    def as_json(self) -> dict[str, Any]:
        """All settings as plain JSON values."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def fixed_names(cls) -> list[str]:
        """Names of the settings that a resumed run must share with the first."""
        return [f.name for f in fields(cls) if not f.metadata.get("free_to_change")]

    @classmethod
    def stored(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Completes the `as_json` of an earlier version of the pack with settings it lacked."""
        return {"precision": "float32", **values}


def _is_whole(value: object, low: int) -> bool:
    return isinstance(value, int) and value >= low


def choose_trained_modules(lock: str) -> frozenset[str]:
    """Which of "retrieval", "encoder", "decoder" a lock setting trains (§4.2, §5.4).

    The retrieval layers are always trained. Raises RetrievalError for an unknown setting.
    """
    if lock not in LOCKS:
        raise RetrievalError(f"The lock setting is {lock!r}; it must be one of {', '.join(LOCKS)}.")
    modules = {"retrieval"}
    if lock != "lock_both":
        modules.add("encoder")
    if lock == "train_both":
        modules.add("decoder")
    return frozenset(modules)
