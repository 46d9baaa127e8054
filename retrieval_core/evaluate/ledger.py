"""The file of results: one JSON line per run, appended whole, readable after any interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import RetrievalError
from ..files import write_text

ROWS, SETTINGS = "runs.jsonl", "settings.json"


class Ledger:
    """`runs.jsonl` in the folder of an evaluation, and the settings that all its rows share.

    Args:
        folder: made if it is missing.
        settings: must be equal for all rows of a table.

    Raises:
        RetrievalError: the folder holds results of other settings, or is damaged.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder, self.path = folder, folder / ROWS
        self._check_settings(json.loads(json.dumps(settings)))
        self.rows = self._read()

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.folder / SETTINGS
        if not path.is_file():
            write_text(path, json.dumps(settings, indent=2) + "\n")
            return
        try:
            held = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError) as error:
            raise RetrievalError(
                f"The settings '{path}' cannot be read ({error}); choose another folder."
            ) from error
        for name in sorted({*settings, *held}):
            old, new = held.get(name), settings.get(name)
            if old != new:
                raise RetrievalError(
                    f"'{self.folder}' holds results with {name} {_shorten(old)} and this run has "
                    f"{_shorten(new)}; choose another folder, or the same settings."
                )

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # the run was killed while it wrote its last line
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        rows = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                row["method"], row["digest"], self.key(row)
            except (ValueError, TypeError, KeyError) as error:
                raise RetrievalError(
                    f"Line {number} of '{self.path}' is no result ({error}); delete that line, and "
                    "its run is done again."
                ) from error
            rows.append(row)
        return rows

    @staticmethod
    def key(row: Mapping[str, Any]) -> tuple:
        """Identifies a row."""
        return row["method"], row["weight"], row["character"], row["prompt"], row["seed"]

    def list_done(
        self, method: str, weight: float | None, digest: str
    ) -> set[tuple[str, str, int]]:
        """`Run.key` of each finished run of a method at a weight.

        Raises:
            RetrievalError: rows of that name have another digest.
        """
        found = set()
        for row in self.rows:
            if row["method"] != method:
                continue
            if row["digest"] != digest:
                raise RetrievalError(
                    f"'{self.folder}' holds results of '{method}' made with other weights, another "
                    "workflow or other sampling settings; give this one another name, or choose "
                    "another folder."
                )
            if row["weight"] == weight:
                found.add((row["character"], row["prompt"], row["seed"]))
        return found

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows at the end of the file; they are on the disk when this returns."""
        new = [dict(row) for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in new).encode()
        try:
            with open(self.path, "ab") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RetrievalError(
                f"Could not write '{self.path}' ({error.strerror or error}); make room, and start "
                "the same command again: it goes on from here."
            ) from error
        self.rows += new


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
