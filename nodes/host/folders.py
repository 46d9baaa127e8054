"""The host's model folders: trained networks and saved references."""

from __future__ import annotations

import os

import folder_paths

from ...retrieval_core.errors import RetrievalError

NETWORKS = "retrieval_controlnet"
REFERENCES = "retrieval_references"
EXTENSIONS = {".safetensors", ".sft"}


def register_folder(name: str) -> None:
    """Makes models/<name> known, with the paths extra_model_paths.yaml added."""
    folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))
    folder_paths.folder_names_and_paths[name][1].update(EXTENSIONS)


def list_files(folder: str) -> list[str]:
    """Names of the files in models/<folder>."""
    return folder_paths.get_filename_list(folder)


def find_file(folder: str, name: str) -> str:
    """The path of a file of `list_files`; RetrievalError if it has gone."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise RetrievalError(
            f"There is no file '{name}' in models/{folder}; choose another, or press R to reload "
            "the list."
        )
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


def describe_file(folder: str, name: str) -> str:
    """`describe_version` of a file of `list_files`, so that the host runs a node again."""
    return describe_version(folder_paths.get_full_path(folder, name) or "")
