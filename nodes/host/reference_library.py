"""Files of saved references in models/retrieval_references: their names, writing and reading."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

import folder_paths

from ...retrieval_core.bank.bank_file import load_references, save_references
from ...retrieval_core.bank.tokens import EncodedReference
from ...retrieval_core.errors import RetrievalError
from .encoded_references import References
from .folders import REFERENCES, check_inside, find_file, first_path, split_name
from .reference_network import ReferenceNetwork

SUFFIX = ".safetensors"


def new_path(prefix: str) -> Path:
    """A path for references named `prefix`: the prefix, a number not yet used, a suffix.

    Args:
        prefix: a name, with "/" for subfolders; the host's %year% and the like are filled in.

    Raises:
        RetrievalError: a name that is empty, or leaves the folder.
    """
    home = os.path.abspath(first_path(REFERENCES))
    parts = split_name(prefix)
    check_inside(home, Path(home, *parts[:-1]), prefix)
    try:
        os.makedirs(home, exist_ok=True)
        folder, name, number, _, _ = folder_paths.get_save_image_path("/".join(parts), home)
    except OSError as error:
        raise RetrievalError(
            f"Could not write in '{home}' ({error.strerror or error}); choose a folder that can "
            "be written."
        ) from error
    check_inside(home, Path(folder), prefix)  # with %year% and the like filled in
    paths = (Path(folder) / f"{name}_{n:05}_{SUFFIX}" for n in count(number))
    # A name that the host's counting passes over is not overwritten either.
    return next(path for path in paths if not path.exists())


def save(references: References, prefix: str) -> Path:
    """Writes references to a new file and returns its path.

    Raises:
        RetrievalError: no references, an unsafe name, or a folder that cannot be written.
    """
    path = new_path(prefix)
    save_references(path, references.encoded, references.network.maker)
    return path


def load(name: str, network: ReferenceNetwork, weight: float = 1.0) -> tuple[EncodedReference, ...]:
    """Loads the references of a file, their weights multiplied by `weight`.

    Raises:
        RetrievalError: no such file, or one that is damaged or was made by another network.
    """
    loaded = load_references(find_file(REFERENCES, name), network.maker)
    return tuple(reference.with_weight(reference.weight * weight) for reference in loaded)
