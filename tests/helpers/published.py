"""The files of the pack that the Comfy registry's command-line tool would publish."""

from __future__ import annotations

import os
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
# What git ignores here, and its own folder.
_NOT_TRACKED = {"__pycache__", "build", "dist", "output", "runs"}


def read_ignored() -> list[str]:
    """The paths in .comfyignore, which are all anchored: a folder's ends with a slash."""
    lines = (PACK / ".comfyignore").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("/") for line in lines if line and not line.startswith("#")]


def list_published() -> list[str]:
    """Paths relative to the pack, with "/" between folders, sorted."""
    ignored = tuple(read_ignored())
    found = []
    for folder, inner, names in os.walk(PACK):
        inner[:] = [
            name
            for name in inner
            if name not in _NOT_TRACKED
            and not name.endswith(".egg-info")
            and (name == ".github" or not name.startswith("."))
        ]
        for name in names:
            path = (Path(folder) / name).relative_to(PACK).as_posix()
            hidden = name.startswith(".") and name not in (".comfyignore", ".gitignore")
            if not hidden and not path.endswith((".pyc", ".pyo")) and not path.startswith(ignored):
                found.append(path)
    return sorted(found)
