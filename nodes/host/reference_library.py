"""Files of saved references in models/retrieval_references: their names, writing and reading."""

from __future__ import annotations

from pathlib import Path

from ...retrieval_core.bank.bank_file import load_references, save_references
from ...retrieval_core.bank.tokens import EncodedReference
from .encoded_references import References
from .folders import REFERENCES, choose_path, find_file
from .reference_network import ReferenceNetwork


def save(references: References, prefix: str) -> Path:
    """Writes references to a new file and returns its path.

    Raises:
        RetrievalError: no references, an unsafe name, or a folder that cannot be written.
    """
    path = choose_path(REFERENCES, prefix)
    save_references(path, references.encoded, references.network.maker)
    return path


def load(name: str, network: ReferenceNetwork, weight: float = 1.0) -> tuple[EncodedReference, ...]:
    """Loads the references of a file, their weights multiplied by `weight`.

    Raises:
        RetrievalError: no such file, or one that is damaged or was made by another network.
    """
    loaded = load_references(find_file(REFERENCES, name), network.maker)
    return tuple(reference.with_weight(reference.weight * weight) for reference in loaded)
