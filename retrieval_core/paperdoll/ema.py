"""Exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class ExponentialMovingAverage:
    """average <- d * average + (1 - d) * parameter, with d = min(decay, (1 + n) / (10 + n)).

    n is the number of updates already made, so that the first weights fade quickly.
    parameters: name -> parameter; the averages have their shapes, device and type.

    `torch.optim.swa_utils.AveragedModel` would copy the frozen modules too.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.parameters = parameters
        self.averages = {name: p.detach().clone() for name, p in parameters.items()}

    def update(self) -> None:
        """Moves the averages towards the current parameters."""
        average = get_ema_multi_avg_fn(min(self.decay, (1 + self.updates) / (10 + self.updates)))
        average(list(self.averages.values()), list(self.parameters.values()), self.updates)
        self.updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The parameters hold the averages inside the `with` block, for evaluation."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._set_parameters(self.averages)
            yield
        finally:
            self._set_parameters(trained)

    @torch.no_grad()
    def _set_parameters(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
