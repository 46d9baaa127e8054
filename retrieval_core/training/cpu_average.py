"""Exponential moving average of the trained parameters in main memory, off the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

EVERY = 10  # steps between updates: each copies all trained parameters from the device


class CpuAverage:
    """average <- d * average + (1 - d) * parameter, every `EVERY` steps and after the last one.

    d = min(decay ** EVERY, (1 + n) / (10 + n)) after n updates, so that the first weights fade
    quickly.

    Args:
        parameters: those to average, by name; empty on processes that need no average.
        decay: of one step.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.averages = {name: copy_to_cpu(p).float() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int, is_last: bool = False) -> None:
        """Moves the averages after `step` steps if it is their turn."""
        if step % EVERY and not is_last:
            return
        decay = min(self.decay**EVERY, (1 + self.updates) / (10 + self.updates))
        for name, average in self.averages.items():
            average.lerp_(self.parameters[name].to("cpu", torch.float32), 1 - decay)
        self.updates += 1

    def choose(self) -> Mapping[str, Tensor]:
        """The averages; the parameters before the first update."""
        return self.averages if self.updates else self.parameters

    @contextmanager
    def put_in_place(self) -> Iterator[None]:
        """The parameters hold what `choose` gives inside the `with` block, and are restored."""
        trained = {name: copy_to_cpu(p) for name, p in self.parameters.items()}
        try:
            self._fill(self.choose())
            yield
        finally:
            self._fill(trained)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


def copy_to_cpu(value: Tensor) -> Tensor:
    """A copy in main memory, which nothing else changes."""
    return value.detach().to("cpu", copy=True).contiguous()
