"""All that a run needs to go on exactly: parameters, optimiser, average and loss scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cpu_average import CpuAverage, copy_to_cpu, gather_parameters, gather_whole


@dataclass(eq=False)
class RunState:
    """What changes in a run besides the step.

    Attributes:
        parameters: the trained ones by name, in the optimiser's order.
        scaler: the scaler of fp16's losses, None in other precisions.
    """

    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    average: CpuAverage
    scaler: Any

    def collect(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of all tensors in main memory, by name, and all other values as JSON.

        All processes call it, because sharded tensors are gathered.
        """
        tensors = {f"weights.{n}": copy_to_cpu(v) for n, v in gather_parameters(self.parameters)}
        tensors |= {f"average.{n}": v.clone() for n, v in self.average.averages.items()}
        numbers: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                entry = f"optimizer.{key}.{name}"
                if isinstance(value, Tensor):
                    tensors[entry] = copy_to_cpu(gather_whole(value))
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
        entries: dict[int, dict[str, Any]] = {}
        values = {**tensors, **state["optimizer"]}
        for index, (name, parameter) in enumerate(self.parameters.items()):
            parameter.copy_(shard_like(tensors[f"weights.{name}"], parameter))
            ending = f".{name}"
            entries[index] = {
                key.removeprefix("optimizer.").removesuffix(ending): restore_value(value, parameter)
                for key, value in values.items()
                if key.startswith("optimizer.") and key.endswith(ending)
            }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        for name, average in self.average.averages.items():
            average.copy_(tensors[f"average.{name}"])
        self.average.updates = state["average_updates"]
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])


def restore_value(value: Any, parameter: Tensor) -> Any:
    """An optimiser's value for a parameter, in new memory of the parameter's layout.

    A view into a file may be aligned differently, and vector code then rounds differently.
    """
    if not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape:
        return value.clone()
    return shard_like(
        torch.empty_like(gather_whole(parameter), dtype=value.dtype).copy_(value), parameter
    )


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded over the processes as a parameter is."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements
    )
