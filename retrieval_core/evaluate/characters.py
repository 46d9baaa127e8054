"""Characters: references, and true attributes where they are known."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data.prepare import PreparedReference, digest_reference, load_image, prepare
from ..errors import RetrievalError
from .protocol import HELD_OUT, IN_DOMAIN, Protocol

FOLDERS = {IN_DOMAIN: "in_domain", HELD_OUT: "held_out"}
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_SIZE = 512


@dataclass(frozen=True, eq=False)
class Character:
    """One character and its references.

    truth: attribute -> value, for a scorer; empty if unknown.
    """

    name: str
    domain: str
    references: Sequence[PreparedReference]
    truth: dict[str, str] = field(default_factory=dict)


def digest_references(character: Character) -> str:
    """16 hexadecimal digits that change with the references' pixels, masks and concepts."""
    own = [f"{digest_reference(r)} {r.concept}" for r in character.references]
    return hashlib.sha256("\n".join(own).encode()).hexdigest()[:16]


def read_characters(folder: Path, protocol: Protocol) -> list[Character]:
    """Characters from `folder/in_domain/<name>/*` and `folder/held_out/<name>/*`, by name.

    Raises:
        RetrievalError: fewer characters than the protocol asks for, a character with fewer
            pictures than references, or a picture that cannot be read.
    """
    found = []
    counts = {IN_DOMAIN: protocol.in_domain, HELD_OUT: protocol.held_out}
    for domain, count in counts.items():
        inner = folder / FOLDERS[domain]
        names = sorted(p for p in inner.iterdir() if p.is_dir()) if inner.is_dir() else []
        if len(names) < count:
            raise RetrievalError(
                f"'{inner}' has {len(names)} folders of characters and the protocol asks for "
                f"{count}; add some, or ask for fewer."
            )
        for path in names[:count]:
            found.append(_read_character(path, domain, protocol.references))
    return found


def _read_character(folder: Path, domain: str, count: int) -> Character:
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)
    if len(paths) < count:
        raise RetrievalError(
            f"'{folder}' has {len(paths)} pictures and the protocol gives {count} references; add "
            "some, or ask for fewer references."
        )
    references = []
    for path in paths[:count]:
        image, alpha = load_image(path)
        references.append(prepare(image, alpha, "figure", 1.0, _SIZE))
    return Character(f"{FOLDERS[domain]}_{folder.name}", domain, references)
