"""Where the host is, for tests/host, and one plain line where there is none."""

from __future__ import annotations

import os
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent


def is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def find_comfyui() -> Path | None:
    """ComfyUI's folder: COMFYUI_PATH, else the one this pack lies in, else comfy-cli's default."""
    named = os.environ.get("COMFYUI_PATH")
    if named:  # never another one than the one asked for
        folder = Path(named).expanduser()
        return folder.resolve() if is_comfyui(folder) else None
    places = (PACK.parent.parent, Path.home() / "comfy" / "ComfyUI")
    return next((place for place in places if is_comfyui(place)), None)


def no_host_line() -> str:
    """Why the host tests were skipped, and how to run them."""
    named = os.environ.get("COMFYUI_PATH")
    why = f"COMFYUI_PATH={named} has no main.py and comfy/" if named else "no ComfyUI was found"
    return (
        f"Host tests (tests/host) skipped: {why}; to run them, set COMFYUI_PATH to ComfyUI's "
        "folder and repeat."
    )


collect_ignore = [] if find_comfyui() else ["host"]


def pytest_terminal_summary(terminalreporter) -> None:
    if find_comfyui() is None:
        terminalreporter.write_line(no_host_line())
