"""Folders of the scores' models, in the format of transformers: in the host's models directory, or
downloaded from the hub.
"""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.hub import check_repository
from ...retrieval_core.metrics.model_folder import check, fetch_model
from .loading import make_progress

VQA, CLIP, DINO = "VQA", "CLIP", "DINO"
# Folders below the models directory, by the host's names where it has one.
ROOTS = {
    VQA: ("VQA", "LLM"),
    CLIP: ("text_encoders", "clip_vision"),
    DINO: ("dino", "clip_vision"),
}
MARK = "config.json"


def list_roots(kind: str) -> list[Path]:
    """Lists the folders that models of a kind lie in, with those of extra_model_paths.yaml."""
    found: list[str] = []
    for name in ROOTS[kind]:
        known = name in folder_paths.folder_names_and_paths
        found += folder_paths.get_folder_paths(name) if known else []
        found.append(os.path.join(folder_paths.models_dir, name))
    return [Path(path) for path in dict.fromkeys(found)]


def list_models(*kinds: str) -> list[str]:
    """Lists the names of the models' folders, as `name` or `group/name`."""
    found = set()
    for root in (root for kind in kinds for root in list_roots(kind)):
        for mark in (*root.glob(f"*/{MARK}"), *root.glob(f"*/*/{MARK}")):
            found.add(mark.parent.relative_to(root).as_posix())
    return sorted(name for name in found if not any(p.startswith(".") for p in name.split("/")))


def fetch_repository(repository: str) -> Path:
    """The folder of a hub repository's model, never one of that name on disk, under the node's bar.

    Raises:
        RetrievalError: not the name of a repository, or see `fetch_model`.
    """
    check_repository(repository)
    return fetch_model(repository, make_progress())


def find_folder(kind: str, name: str, repository: str = "") -> Path:
    """Finds the folder of a model, or fetches it from the hub if a repository is named.

    Raises:
        RetrievalError: no such folder, one that lacks a part, not the name of a repository, or see
            `fetch_model`.
    """
    if repository := repository.strip():
        return fetch_repository(repository)
    if name not in list_models(kind):
        roots = " or ".join(f"models/{root}" for root in ROOTS[kind])
        raise RetrievalError(
            f"There is no folder '{name}' with a {MARK} in {roots}; choose another, name a "
            "repository of the hub, or press R to reload the list."
        )
    folder = next(root / name for root in list_roots(kind) if (root / name / MARK).is_file())
    check(folder)
    return folder
