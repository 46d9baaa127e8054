"""Where the scores' models lie: folders in the format of transformers, in the host's models
directory, or repositories of the hub.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import folder_paths

from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.metrics.model_folder import check
from .loading import make_transfer_progress

VQA, CLIP, DINO = "VQA", "CLIP", "DINO"
# Folders below the models directory, by the host's names where it has one.
ROOTS = {
    VQA: ("VQA", "LLM"),
    CLIP: ("text_encoders", "clip_vision"),
    DINO: ("dino", "clip_vision"),
}
MARK = "config.json"


def list_roots(kind: str) -> list[Path]:
    """Where models of a kind are looked for, with the paths extra_model_paths.yaml added."""
    found: list[str] = []
    for name in ROOTS[kind]:
        known = name in folder_paths.folder_names_and_paths
        found += folder_paths.get_folder_paths(name) if known else []
        found.append(os.path.join(folder_paths.models_dir, name))
    return [Path(path) for path in dict.fromkeys(found)]


def list_models(*kinds: str) -> list[str]:
    """Names of the models' folders, as `name` or `group/name`."""
    found = set()
    for root in (root for kind in kinds for root in list_roots(kind)):
        for mark in (*root.glob(f"*/{MARK}"), *root.glob(f"*/*/{MARK}")):
            found.add(mark.parent.relative_to(root).as_posix())
    return sorted(name for name in found if not any(p.startswith(".") for p in name.split("/")))


def find_folder(kind: str, name: str, repository: str = "") -> Path:
    """The folder of a model, fetched from the hub first if a repository is named.

    Raises:
        RetrievalError: no such folder, a path that leaves the models directory, a folder that lacks
            a part, not the name of a repository, or what `find_model` says of fetching it.
    """
    if repository.strip():
        return _fetch(repository.strip())
    places = " or ".join(f"models/{place}" for place in ROOTS[kind])
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or "/" in parts or any(c in "\\:\0" for c in name):
        raise RetrievalError(
            f"{name!r} is not the name of a folder inside {places}; choose one from the list."
        )
    for root in list_roots(kind):
        folder = root.joinpath(*parts)
        if (folder / MARK).is_file():
            check(folder)
            return folder
    raise RetrievalError(
        f"There is no folder '{name}' with a {MARK} in {places}; choose another, name a "
        "repository of the hub, or press R to reload the list."
    )


def _fetch(repository: str) -> Path:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from ...retrieval_core.metrics.model_folder import find_model

    try:
        validate_repo_id(repository)
        # Not a folder that happens to lie beside the host, which `find_model` would take.
        named = "/" in repository and not Path(repository).is_dir()
    except HFValidationError:
        named = False
    if not named:
        raise RetrievalError(
            f"{repository!r} is not the name of a hub repository; write it as owner/name."
        )
    return find_model(repository, make_transfer_progress())
