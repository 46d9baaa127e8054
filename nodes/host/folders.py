"""The host's model folders: trained networks and saved references; names of new files in them."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path, PurePosixPath

import folder_paths

from ...retrieval_core.errors import RetrievalError

NETWORKS = "retrieval_controlnet"
REFERENCES = "retrieval_references"
EXTENSIONS = {".safetensors", ".sft"}
_FORBIDDEN = '<>:"|?*'


def register_folder(name: str) -> None:
    """Makes models/<name> known, with the paths extra_model_paths.yaml added."""
    folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))
    folder_paths.folder_names_and_paths[name][1].update(EXTENSIONS)


def list_files(folder: str) -> list[str]:
    """Names of the files in models/<folder>."""
    return folder_paths.get_filename_list(folder)


def find_file(folder: str, name: str | None) -> str:
    """The path of a file of `list_files`; None is what the page queues if its list is empty.

    Raises:
        RetrievalError: no file is chosen, or it has gone.
    """
    path = None if name is None else folder_paths.get_full_path(folder, name)
    if path is None:
        problem = "No file is chosen" if name is None else f"There is no file '{name}'"
        files = list_files(folder)
        advice = "choose one, or" if files else "the folder has none, so put one there and"
        raise RetrievalError(f"{problem} in models/{folder}; {advice} press R to reload the list.")
    return path


def first_path(folder: str) -> str:
    """The path that new files of models/<folder> are written to."""
    return folder_paths.get_folder_paths(folder)[0]


def describe_version(path: str | os.PathLike[str]) -> str:
    """Changes when a file does; "missing" if it has gone."""
    try:
        status = os.stat(path)
    except OSError:
        return "missing"
    return f"{status.st_mtime_ns} {status.st_size}"


def describe_file(folder: str, name: str | None) -> str:
    """`describe_version` of a file of `list_files`, so that the host runs a node again."""
    return describe_version(folder_paths.get_full_path(folder, name or "") or "")


def split_name(name: str) -> tuple[str, ...]:
    """The parts of a new file's or folder's name, with "/" for subfolders.

    Raises:
        RetrievalError: a name that is empty, or could leave its folder.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    plain = all(part == part.strip() and not part.startswith((".", "/")) for part in parts)
    unsafe = any(c in _FORBIDDEN or ord(c) < 32 for c in name)
    if not parts or not plain or unsafe:
        raise RetrievalError(
            f"{name!r} is not a plain file name; write it as name or folder/name, without dots "
            f"in front and without {' '.join(_FORBIDDEN)}."
        )
    return parts


def check_inside(home: str | os.PathLike[str], path: Path, name: str) -> None:
    """Raises RetrievalError if links lead a path with a plain name out of the folder `home`."""
    if not path.resolve().is_relative_to(Path(home).resolve()):
        raise RetrievalError(
            f"{name!r} would be written outside '{home}'; remove the link there, or choose "
            "another name."
        )


def choose_path(folder: str, prefix: str) -> Path:
    """A path for a new file of models/<folder>: the prefix, a number not yet used, a suffix.

    Args:
        prefix: a name, with "/" for subfolders; the host's %year% and the like are filled in.

    Raises:
        RetrievalError: a name that is empty, or leaves the folder.
    """
    home = os.path.abspath(first_path(folder))
    parts = split_name(prefix)
    check_inside(home, Path(home, *parts[:-1]), prefix)
    try:
        os.makedirs(home, exist_ok=True)
        place, name, number, _, _ = folder_paths.get_save_image_path("/".join(parts), home)
    except OSError as error:
        raise RetrievalError(
            f"Could not write in '{home}' ({error.strerror or error}); choose a folder that can "
            "be written."
        ) from error
    check_inside(home, Path(place), prefix)  # with %year% and the like filled in
    paths = (Path(place) / f"{name}_{n:05}_.safetensors" for n in count(number))
    # A name that the host's counting passes over is not overwritten either.
    return next(path for path in paths if not path.exists())
