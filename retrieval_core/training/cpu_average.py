"""Exponential moving average of the trained parameters in main memory, off the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

EVERY = 10  # steps between updates: each copies all trained parameters from the device


class CpuAverage:
    """average <- d * average + (1 - d) * parameter, every `EVERY` steps.

    d = min(decay ** EVERY, (1 + n) / (10 + n)) after n updates, so that the first weights fade
    quickly.

    `averages`: name -> float32 tensor. Empty if `decay` is None, and on processes that store none.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float | None, stores: bool) -> None:
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.averages: dict[str, Tensor] = {}
        for name, value in gather_parameters(parameters if decay is not None else {}):
            if stores:
                self.averages[name] = copy_to_cpu(value).float()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the averages after `step` steps if it is their turn."""
        if self.decay is None or step % EVERY:
            return
        decay = min(self.decay**EVERY, (1 + self.updates) / (10 + self.updates))
        for name, value in gather_parameters(self.parameters):
            if name in self.averages:
                self.averages[name].lerp_(value.to("cpu", torch.float32), 1 - decay)
        self.updates += 1


def gather_parameters(parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Pairs of name and whole value; sharded ones are gathered, by all processes at once."""
    for name, value in parameters.items():
        yield name, gather_whole(value.detach())


def gather_whole(value: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded over processes (FSDP's DTensor)."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def copy_to_cpu(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()
