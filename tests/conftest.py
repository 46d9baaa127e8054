"""Where the host is, for tests/host, and one plain line where they cannot run."""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
# Of ComfyUI's requirements, those without which it starts all the same.
DISPENSABLE = {"torchaudio", "comfyui-embedded-docs", "comfyui-workflow-templates"}
SHOWN = 5
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")


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


def missing_requirements(comfyui: Path) -> list[str]:
    """The packages of ComfyUI's requirements.txt that this Python lacks."""
    file = comfyui / "requirements.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    missing = []
    for line in lines:
        if "non essential" in line:  # ComfyUI's own heading over what it can do without
            break
        named = re.match(r"[A-Za-z0-9._-]+", line)
        if named and named[0].lower() not in DISPENSABLE:
            try:
                metadata.distribution(named[0])
            except metadata.PackageNotFoundError:
                missing.append(named[0])
    return missing


def no_host_line() -> str | None:
    """Why the tests with a host are skipped, and how to run them; None if they can run."""
    comfyui = find_comfyui()
    if comfyui is None:
        named = os.environ.get("COMFYUI_PATH")
        why = f"COMFYUI_PATH={named} has no main.py and comfy/" if named else "no ComfyUI was found"
        how = "set COMFYUI_PATH to ComfyUI's folder and repeat"
    else:
        missing = missing_requirements(comfyui)
        if not missing:
            return None
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        why = (
            f"{sys.executable} lacks {', '.join(missing[:SHOWN])}{more} of the requirements of "
            f"{comfyui}"
        )
        how = (
            "install pytest into the Python that runs ComfyUI, set RETRIEVAL_PYTHON to it and "
            "repeat"
        )
    return f"Host tests (tests/host) skipped: {why}; to run them, {how}."


def no_chromium_line() -> str | None:
    """Why the browser tests are skipped where there is a host; None if they can run."""
    if any(map(shutil.which, CHROMIUM)):
        return None
    return (
        f"Browser tests (tests/browser) skipped: none of {', '.join(CHROMIUM)} was found; to run "
        "them, install Chromium, as with apt install chromium."
    )


if os.environ.get("RETRIEVAL_ON_GPU"):
    sys.path.insert(0, str(PACK))
    from tests.helpers.dynamic_vram import load_library

    load_library()
_skipped = no_host_line() or no_chromium_line()
collect_ignore = (["host"] if no_host_line() else []) + (["browser"] if _skipped else [])


def pytest_terminal_summary(terminalreporter) -> None:
    if _skipped:
        terminalreporter.write_line(_skipped)
