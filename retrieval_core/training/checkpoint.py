"""Training checkpoints: safetensors files, written atomically; a folder holds the last two."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
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
    """All state that a run needs to resume exactly.

    step: steps done. tensors: flat name -> tensor (`weights.*`, `exp_avg.*`, ...).
    state: JSON values (counters, settings, description of the run).
    history: name -> one float per step done, NaN where a step has none.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    history: dict[str, list[float]]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes `last.safetensors`; the file of that name before becomes `previous.safetensors`.

    At any moment at which the process may be killed, one of the two is complete. Raises
    RetrievalError if the folder cannot be written.
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
        # A damaged last file must not replace the complete previous one.
        if _is_complete(last):
            os.replace(last, folder / PREVIOUS)

    atomic_write(last, write)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Reads the newest complete checkpoint in `folder` to the CPU; None if there is no file.

    Raises RetrievalError if there are files but none can be read.
    """
    reasons = []
    for path in (folder / LAST, folder / PREVIOUS):
        if path.exists():
            try:
                return _read_checkpoint(path)
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                reasons.append(f"{path.name}: {error}")
    if reasons:
        raise RetrievalError(
            f"No checkpoint in {folder} can be read ({'; '.join(reasons)}); "
            "remove them to start from the first step, or choose another folder."
        )
    return None


def remove_leftovers(folder: Path) -> None:
    """Removes the half-written files that a killed process left in `folder`."""
    for pattern in (f".{LAST}.*", ".losses.csv.*", ".losses.png.*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _read_checkpoint(path: Path) -> Checkpoint:
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


def _is_complete(path: Path) -> bool:
    """Whether the file's length matches its header, which safetensors checks on opening."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
