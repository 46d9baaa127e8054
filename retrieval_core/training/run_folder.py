"""The folder of a run: what the run is, and its newest checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import RetrievalError, explain
from ..files import check_format, parse_json, save_safetensors, write_text

RUN = "run.json"
_FORMAT, _VERSION = "retrieval_run", "1"


class RunFolder:
    """Checkpoints `step-<number>.safetensors`, written on a thread while training goes on.

    A checkpoint appears whole or not at all, and older ones are removed only after it: a kill or a
    full disk at any moment leaves the one before.

    Args:
        keep: number of newest checkpoints that are kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def describe_run(self, description: Mapping[str, Any], writes: bool) -> None:
        """Records what the run is, or refuses to go on with another one.

        Args:
            description: JSON values; all must be what they were when the run was started.
            writes: whether this process writes the file; the others only compare.

        Raises:
            RetrievalError: a value differs, or the folder cannot be written.
        """
        now, then = json.loads(json.dumps(dict(description))), self.read_description()
        for name in now if then else ():
            if then.get(name) != now[name]:
                raise RetrievalError(
                    f"The run in '{self.folder}' was started with {name} = {then.get(name)}, not "
                    f"{now[name]}; use {then.get(name)} to go on with it, or another folder to "
                    "start anew."
                )
        if writes:
            if not then:
                write_text(self.folder / RUN, json.dumps(now, indent=2) + "\n")
            for path in self.folder.glob(".step-*"):  # of a process that was killed
                path.unlink(missing_ok=True)

    def read_description(self) -> dict[str, Any]:
        """What was recorded when the run was started; empty for a new folder."""
        path = self.folder / RUN
        if not path.is_file():
            return {}
        return parse_json(path.read_text(encoding="utf-8"), "run", path)

    def list_checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*.safetensors"))

    def load_newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and JSON values of the newest checkpoint that can be read; None if there is none.

        Raises RetrievalError if there are checkpoints and none can be read.
        """
        reasons = []
        for path in reversed(self.list_checkpoints()):
            try:
                with safe_open(path, framework="pt") as file:
                    metadata = file.metadata() or {}
                    check_format(path, metadata, _FORMAT, "remove it", int(_VERSION))
                    return {k: file.get_tensor(k) for k in file.keys()}, json.loads(
                        metadata["state"]
                    )
            except (OSError, SafetensorError, RetrievalError) as error:
                reasons.append(f"{path.name}: {explain(error)}")
        if reasons:
            raise RetrievalError(
                f"No checkpoint in '{self.folder}' can be read ({'; '.join(reasons)}); remove them "
                "to start from the first step, or choose another folder."
            )
        return None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint, when the one before is written.

        Args:
            tensors: in main memory; nobody may change them any more.
        """
        self.wait()
        metadata = {"format": _FORMAT, "format_version": _VERSION, "state": json.dumps(state)}
        self._writing = self._thread.submit(self._write, step, tensors, metadata)

    def _write(self, step: int, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        save_safetensors(self.folder / f"step-{step:08d}.safetensors", tensors, metadata)
        for path in self.list_checkpoints()[: -self.keep]:
            path.unlink(missing_ok=True)

    def raise_failure(self) -> None:
        """Raises the RetrievalError of a checkpoint that could not be written, if it is known."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Returns when no checkpoint is being written; RetrievalError if it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
