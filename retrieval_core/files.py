"""Reads and checks safetensors files, and writes files atomically."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import RetrievalError


def atomic_write(
    path: str | os.PathLike[str], write: Callable[[Path], object], sync: bool = True
) -> None:
    """Calls `write(temporary path)` in the target's folder, then renames it into place.

    Until the rename the old file stays whole; after a failure no temporary file is left.

    Args:
        sync: waits until the data is on the disk. Without, small files are written several times
            as fast, but a power failure may leave the file empty.

    Raises:
        RetrievalError: the folder cannot be made or written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        # mkstemp creates files that only their owner can read; apply the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        if sync:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # the latter of a full disk, too
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number else error
        raise RetrievalError(
            f"Could not write '{path}' ({reason}); choose a folder that can be written, with "
            "enough room."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, sync: bool = True) -> None:
    """`atomic_write` of UTF-8 text."""
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), sync)


def save_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes tensors and string metadata atomically (see `atomic_write`)."""
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save = safetensors.torch.save_file
    atomic_write(path, lambda temporary: save(contiguous, temporary, dict(metadata)))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The string metadata of a safetensors file, without reading its tensors."""
    with _open(path) as file:
        return dict(file.metadata() or {})


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and metadata of a safetensors file.

    Raises:
        RetrievalError: missing, a folder, truncated, or not a safetensors file.
    """
    with _open(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})


def _open(path: str | os.PathLike[str]) -> Any:
    path = Path(path)
    try:
        if path.is_dir():
            raise RetrievalError(f"'{path}' is a folder; name one safetensors file in it.")
        if not path.is_file():
            raise RetrievalError(f"There is no file '{path}'; check the name and the folder.")
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise RetrievalError(
            f"'{path}' is not a whole safetensors file ({error}); download or copy it again."
        ) from error


def check_format(
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    expected: str,
    remedy: str,
    newest: int | None = None,
) -> None:
    """Refuses a file of another format or of a newer version.

    Args:
        remedy: what the user is to do about another format, an imperative clause.
        newest: highest `format_version` that is read; None for formats without versions.
    """
    found = metadata.get("format") or "no format field"
    if found != expected:
        raise RetrievalError(
            f"The metadata of '{path}' has {found!r} where {expected!r} is expected; {remedy}."
        )
    version = metadata.get("format_version", "")
    if newest is not None and version not in map(str, range(1, newest + 1)):
        raise RetrievalError(
            f"'{path}' has format version {version or 'none'} and this pack reads up to {newest}; "
            "update the pack."
        )


def parse_json(text: str | None, what: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parses the JSON object of a metadata field; RetrievalError names the field and the file."""
    try:
        value = json.loads(text or "")
    except json.JSONDecodeError as error:
        raise RetrievalError(
            f"The field '{what}' of '{path}' is not JSON ({error}); use a file saved by this pack."
        ) from error
    if not isinstance(value, dict):
        raise RetrievalError(
            f"The field '{what}' of '{path}' is {type(value).__name__}, not a JSON object; use a "
            "file saved by this pack."
        )
    return value
