"""What a training run is made of: optimisation settings and the paper's ablation (§5.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from ..errors import RetrievalError

Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
Lock = Literal["train_both", "lock_decoder", "lock_both"]
LOCKS: tuple[str, ...] = get_args(Lock)
Task = Literal["same_character", "compose"]

# Settings that only say when something is written: a run may be resumed with others.
_FREE = {"free_to_change": True}


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of the optimisation; one object per run.

    steps: optimiser steps in all; the cosine decay ends there.
    batch_size: items per step (read by the caller's batches; kept so that a resume checks it).
    learning_rate: highest rate, reached after `warmup_steps` steps of linear warm-up.
    final_learning_rate_ratio: the cosine ends at this share of `learning_rate`, 0 to 1.
    weight_decay: AdamW's, on parameters of two or more dimensions (not biases and norms).
    betas: AdamW's. clip_norm: largest gradient norm. ema_decay: 0 to below 1.
    precision: of the forward pass's products; parameters, optimiser and sums stay in float32.
    seed: all randomness of the run. checkpoint_every: steps between checkpoints.

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
        if isinstance(self.betas, list):
            object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("steps", "batch_size", "checkpoint_every"):
            self._check(name, _whole(getattr(self, name), 1), "a whole number of 1 or more")
        for name in ("warmup_steps", "seed"):
            self._check(name, _whole(getattr(self, name), 0), "a whole number of 0 or more")
        self._check("seed", self.seed < 2**63, "below 2**63")
        self._check("warmup_steps", self.warmup_steps < self.steps, f"below steps ({self.steps})")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            self._check(name, _number(value) and value > 0, "a finite number above 0")
        value = self.weight_decay
        self._check("weight_decay", _number(value) and value >= 0, "a finite number of 0 or more")
        value = self.final_learning_rate_ratio
        self._check("final_learning_rate_ratio", _number(value) and 0 <= value <= 1, "0 to 1")
        value = self.ema_decay
        self._check("ema_decay", _number(value) and 0 <= value < 1, "0 to below 1")
        self._check("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        good = isinstance(self.betas, tuple) and len(self.betas) == 2
        good = good and all(_number(beta) and 0 <= beta < 1 for beta in self.betas)
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
        """Plain JSON values of all settings."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def fixed_names(cls) -> list[str]:
        """Names of the settings that a resumed run must share with the first."""
        return [f.name for f in fields(cls) if not f.metadata.get("free_to_change")]

    @classmethod
    def stored(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """`as_json` of an earlier version of the pack, with what it did not have yet."""
        return {"precision": "float32", **values}


def _whole(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def choose_trained_parts(lock: str) -> frozenset[str]:
    """Which of "retrieval", "encoder", "decoder" a lock setting trains (§4.2, §5.4).

    The retrieval layers are trained in every setting. Raises RetrievalError on another name.
    """
    if lock not in LOCKS:
        raise RetrievalError(f"The lock setting is {lock!r}; it must be one of {', '.join(LOCKS)}.")
    parts = {"retrieval"}
    if lock != "lock_both":
        parts.add("encoder")
    if lock == "train_both":
        parts.add("decoder")
    return frozenset(parts)


@dataclass(frozen=True)
class Ablation:
    """One row of Table 3: task, steps, probability of dropping the text, what is locked.

    `batch_size` and `learning_rate` are not part of a row. The two rows of each task with
    another text drop rate lost their number in the text; make them with `with_text_drop`.
    """

    name: str
    task: Task
    steps: int
    lock: Lock = "train_both"
    text_drop: float = 0.5

    def with_text_drop(self, probability: float) -> Ablation:
        """The same row with another probability of dropping the text, 0 to 1."""
        if not _number(probability) or not 0 <= probability <= 1:
            raise RetrievalError(f"The text drop probability is {probability!r}; give 0 to 1.")
        return replace(self, name=f"{self.name}-drop{probability:g}", text_drop=probability)


def _table_3() -> dict[str, Ablation]:
    rows = []
    for label, task in (("Recon", "same_character"), ("Compose", "compose")):
        rows += [
            Ablation(f"{label}9K", task, 9_000),
            Ablation(f"{label}9K-lockDecoder", task, 9_000, "lock_decoder"),
            Ablation(f"{label}9K-lockBoth", task, 9_000, "lock_both"),
            Ablation(f"{label}45K", task, 45_000),
        ]
    return {row.name: row for row in rows}


ABLATIONS: dict[str, Ablation] = _table_3()


def ablation(name: str) -> Ablation:
    """A row of Table 3 by its name in the paper, upper and lower case alike."""
    for row in ABLATIONS.values():
        if row.name.lower() == name.lower():
            return row
    raise RetrievalError(f"There is no setting {name!r}; the names are {', '.join(ABLATIONS)}.")
