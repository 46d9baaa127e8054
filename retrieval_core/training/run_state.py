"""All that a run needs to go on exactly: parameters, optimiser, average and loss scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cpu_average import CpuAverage, copy_to_cpu


@dataclass(eq=False)
class RunState:
    """What changes in a run besides the step.

    Attributes:
        parameters: the trained ones by name, in the optimiser's order.
        scaler: the scaler of fp16's losses, None in other precisions.
        is_sharded: whether each process has only a share of the optimiser's state.
    """

    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    average: CpuAverage
    scaler: Any
    is_sharded: bool

    def gather_optimizer(self) -> None:
        """Brings a sharded optimiser's state to process 0, before it can `collect`.

        All processes call it.
        """
        if self.is_sharded:
            self.optimizer.consolidate_state_dict(to=0)

    def collect(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of all tensors in main memory, by name, and all other values as JSON."""
        tensors = {f"weights.{name}": copy_to_cpu(p) for name, p in self.parameters.items()}
        tensors |= {f"average.{name}": t.clone() for name, t in self.average.averages.items()}
        names, numbers = list(self.parameters), {}
        for index, values in self.optimizer.state_dict()["state"].items():
            for key, value in values.items():
                entry = f"optimizer.{key}.{names[index]}"
                if isinstance(value, Tensor):
                    tensors[entry] = copy_to_cpu(value)
                else:
                    numbers[entry] = value
        state = {
            "optimizer": numbers,
            "average_updates": self.average.updates,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }
        return tensors, state

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Takes over what `collect` gave."""
        indices = {name: index for index, name in enumerate(self.parameters)}
        entries: dict[int, dict[str, Any]] = {}
        for entry, value in {**tensors, **state["optimizer"]}.items():
            kind, key, name = (*entry.split(".", 2), "")[:3]
            if kind == "optimizer":
                # In new memory: a view into the file may be aligned differently, and vector code
                # then rounds differently.
                value = value.clone() if isinstance(value, Tensor) else value
                entries.setdefault(indices[name], {})[key] = value
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"weights.{name}"])
        numbers, groups = iter(range(len(indices))), []
        for group in self.optimizer.param_groups:
            groups.append({**group, "params": [next(numbers) for _ in group["params"]]})
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        for name, average in self.average.averages.items():
            average.copy_(tensors[f"average.{name}"])
        self.average.updates = state["average_updates"]
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
