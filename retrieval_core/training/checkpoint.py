"""Training checkpoints: one safetensors file each, never half written, the last two kept."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import RetrievalError
from ..files import atomic_write

LAST = "last.safetensors"
PREVIOUS = "previous.safetensors"
_FORMAT = "retrieval_training_checkpoint"
_VERSION = "1"


@dataclass
class Checkpoint:
    """Everything a run needs to go on exactly as if it had never stopped.

    step: steps done. tensors: flat name -> tensor (`weights.*`, `exp_avg.*`, ...).
    state: JSON values (counters, settings, description of the run).
    history: name -> one float per step done (NaN where a step has no such value).
    """

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any] = field(default_factory=dict)
    history: dict[str, list[float]] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `last.safetensors`, keeping the one before as `previous.safetensors`.

    Whatever the moment the process dies, one of the two is complete. Raises RetrievalError if
    the folder cannot be written.
    """
    last = folder / LAST
    tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
    for name, values in checkpoint.history.items():
        tensors[f"history.{name}"] = torch.tensor(values, dtype=torch.float64)
    state = json.dumps({**checkpoint.state, "step": checkpoint.step}, sort_keys=True)
    metadata = {"format": _FORMAT, "format_version": _VERSION, "state": state}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # a full disk surfaces as this class, not OSError
            raise OSError(str(error)) from error
        # A damaged last file must not push out the complete previous one.
        if _complete(last):
            os.replace(last, folder / PREVIOUS)

    atomic_write(last, write)
    return last


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint in `folder`, on the CPU, or None where there is none.

    Raises RetrievalError if there are checkpoints but none that can be read.
    """
    reasons = []
    for path in (folder / LAST, folder / PREVIOUS):
        if path.exists():
            try:
                return _read(path)
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                reasons.append(f"{path.name}: {error}")
    if reasons:
        raise RetrievalError(
            f"No checkpoint in {folder} can be read ({'; '.join(reasons)}); "
            "remove them to start from the first step, or choose another folder."
        )
    return None


def remove_leftovers(folder: Path) -> None:
    """Remove the half-written files that a killed process left in `folder`."""
    for pattern in (f".{LAST}.*", ".losses.csv.*", ".losses.png.*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _read(path: Path) -> Checkpoint:
    tensors, history = {}, {}
    with safe_open(path, framework="pt", device="cpu") as file:
        metadata = file.metadata() or {}
        found = (metadata.get("format"), metadata.get("format_version"))
        if found != (_FORMAT, _VERSION):
            raise ValueError(f"format {found}, expected {(_FORMAT, _VERSION)}")
        state = json.loads(metadata["state"])
        for name in file.keys():
            if name.startswith("history."):
                history[name.removeprefix("history.")] = file.get_tensor(name).tolist()
            else:
                tensors[name] = file.get_tensor(name)
    return Checkpoint(int(state.pop("step")), tensors, state, history)


def _complete(path: Path) -> bool:
    """Whether the file's length agrees with its header (safetensors checks that on opening)."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
