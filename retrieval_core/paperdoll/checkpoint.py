"""Training checkpoints: safetensors files, written atomically; a folder holds the last two."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import RetrievalError
from ..files import save_safetensors

LAST = "last.safetensors"
PREVIOUS = "previous.safetensors"
_FORMAT = "retrieval_training_checkpoint"
_VERSION = "1"


def save_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    """Writes `last.safetensors`; the file of that name before becomes `previous.safetensors`.

    At any moment at which the process may be killed, one of the two is complete. `state` holds JSON
    values. Raises RetrievalError if the folder cannot be written.
    """
    last = folder / LAST
    # A damaged last file must not replace the complete previous one.
    if _is_complete(last):
        os.replace(last, folder / PREVIOUS)
    text = json.dumps(state, sort_keys=True)
    save_safetensors(last, tensors, {"format": _FORMAT, "format_version": _VERSION, "state": text})


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
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


def _read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        metadata = file.metadata() or {}
        found = (metadata.get("format"), metadata.get("format_version"))
        if found != (_FORMAT, _VERSION):
            raise ValueError(f"format {found}, expected {(_FORMAT, _VERSION)}")
        state = json.loads(metadata["state"])
        return {name: file.get_tensor(name) for name in file.keys()}, state


def _is_complete(path: Path) -> bool:
    """Whether the file's length matches its header, which safetensors checks on opening."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
