"""Exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class ExponentialMovingAverage:
    """average <- d * average + (1 - d) * parameter, with d = min(decay, (1 + n) / (10 + n)).

    n is the number of updates already made, so that the first weights fade quickly.
    parameters: name -> parameter; the averages have their shapes, device and type.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.parameters = dict(parameters)
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            list(self.averages.values()),
            [parameter.detach() for parameter in self.parameters.values()],
            1.0 - decay,
        )
        self.updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The parameters hold the averages inside the `with` block, for evaluation."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._fill(self.averages)
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
