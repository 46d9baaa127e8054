"""All that a run needs to go on exactly: parameters, optimiser, average and loss scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
            for key, value in flatten_state(values):
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
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"weights.{name}"])
        # Each process loads its own share alone. ZeRO's `load_state_dict` would hold a second copy
        # of it on the device, and keeps fused AdamW's steps in main memory.
        optimizer = self.optimizer.optim if self.is_sharded else self.optimizer
        names = {parameter: name for name, parameter in self.parameters.items()}
        indices: dict[str, int] = {}
        groups = []
        for group in optimizer.param_groups:
            indices |= {names[p]: i for i, p in enumerate(group["params"], len(indices))}
            groups.append({**group, "params": [indices[names[p]] for p in group["params"]]})
        entries: dict[int, dict[str, Any]] = {}
        for entry, value in {**tensors, **state["optimizer"]}.items():
            kind, key, name = (*entry.split(".", 2), "")[:3]
            if kind == "optimizer" and name in indices:
                *outer, key = key.split("/")
                values = entries.setdefault(indices[name], {})
                for one in outer:
                    values = values.setdefault(one, {})
                # In new memory: a view into the file may be aligned differently, and vector code
                # then rounds differently.
                values[key] = value.clone() if isinstance(value, Tensor) else value
        optimizer.load_state_dict({"state": entries, "param_groups": groups})
        for name, average in self.average.averages.items():
            average.copy_(tensors[f"average.{name}"])
        self.average.updates = state["average_updates"]
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])


def flatten_state(values: Mapping[str, Any], outer: str = "") -> Iterator[tuple[str, Any]]:
    """A parameter's optimiser state with bitsandbytes' nested dicts as keys joined by slashes."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten_state(value, f"{outer}{key}/")
        else:
            yield f"{outer}{key}", value
