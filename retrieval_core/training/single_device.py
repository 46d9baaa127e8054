"""Training on one device inside a process that is not training's own, such as ComfyUI's.

accelerate has one state for a whole process, its precision and device included, and a host may
lack it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .paper_objective import HALF
from .run_config import RunConfig


class SingleDevice:
    """As much of accelerate's `Accelerator` as `training_run.train` uses, in one process.

    Attributes:
        sync_gradients: whether the current pass is the last one of its optimiser step.
        told: the lines that were printed.
    """

    process_index, num_processes, is_main_process = 0, 1, True

    def __init__(self, device: torch.device, config: RunConfig) -> None:
        self.device, self.passes = device, config.accumulate
        self.dtype = HALF.get(config.precision)
        self.scaler = torch.amp.GradScaler(device.type) if config.precision == "fp16" else None
        self.sync_gradients = False
        self.told: list[str] = []
        self._done = 0

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, device_placement: Any
    ) -> tuple[Callable[..., dict[str, Tensor]], SteppingOptimizer]:
        """The objective's forward pass in the run's precision, and its optimiser."""

        self._optimizer = optimizer

        def compute(*inputs: Any) -> dict[str, Tensor]:
            with self.autocast():
                return objective(*inputs)

        return compute, SteppingOptimizer(optimizer, self)

    def autocast(self) -> torch.amp.autocast:
        kind = self.device.type
        return torch.amp.autocast(kind, self.dtype, self.dtype is not None, cache_enabled=False)

    @contextmanager
    def accumulate(self, _: Any) -> Iterator[None]:
        self._done += 1
        self.sync_gradients = self._done % self.passes == 0
        yield

    def backward(self, loss: Tensor) -> None:
        loss = loss / self.passes
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def clip_grad_norm_(self, parameters: Any, largest: float) -> Tensor:
        if self.scaler is not None:
            self.scaler.unscale_(self._optimizer)
        return nn.utils.clip_grad_norm_(parameters, largest)

    def reduce(self, values: Tensor, _: str) -> Tensor:
        return values

    def print(self, text: str) -> None:
        self.told.append(text)
        print(text, flush=True)

    def wait_for_everyone(self) -> None:
        """There is one process."""

    def log(self, values: Any, step: int) -> None:
        """Who watches the run is told of the losses."""

    def end_training(self) -> None:
        """There is nothing to close."""


class SteppingOptimizer:
    """An optimiser that steps after the last pass, and undoes the scaling of fp16's losses."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: SingleDevice) -> None:
        self.optimizer, self.device = optimizer, device

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self) -> None:
        if not self.device.sync_gradients:
            return
        if self.device.scaler is None:
            self.optimizer.step()
        else:
            self.device.scaler.step(self.optimizer)
            self.device.scaler.update()

    def zero_grad(self) -> None:
        if self.device.sync_gradients:
            self.optimizer.zero_grad()
