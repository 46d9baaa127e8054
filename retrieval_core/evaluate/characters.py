"""Who is drawn: characters of the paper-doll world, or folders of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..data.prepare import PreparedReference, load_image, prepare
from ..errors import RetrievalError
from ..paperdoll.cases import prepared
from ..paperdoll.draw import render
from ..paperdoll.judge import FACE, GARMENTS, truth
from ..paperdoll.world import (
    BACKGROUNDS,
    Figure,
    random_identity,
    random_outfit,
    random_scene,
)
from .protocol import HELD_OUT, IN_DOMAIN, Protocol

FOLDERS = {IN_DOMAIN: "in_domain", HELD_OUT: "held_out"}
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_SIZE = 512


@dataclass(frozen=True, eq=False)
class Character:
    """One character: its references, and of a paper doll the truth about them.

    wanted: attribute -> value, empty where nobody knows. background: the one of all references.
    """

    name: str
    domain: str
    references: Sequence[PreparedReference]
    wanted: dict[str, str] = field(default_factory=dict)
    background: str = ""


def paperdolls(protocol: Protocol) -> list[Character]:
    """Paper dolls of training's identities and outfits in new pictures, then held-out ones."""
    counts = ((IN_DOMAIN, protocol.in_domain), (HELD_OUT, protocol.held_out))
    return [
        _paperdoll(protocol, domain, index) for domain, count in counts for index in range(count)
    ]


def _paperdoll(protocol: Protocol, domain: str, index: int) -> Character:
    held = domain == HELD_OUT
    rng = np.random.default_rng([protocol.seed, index, 20 + held])
    who, clothes = random_identity(rng, held), random_outfit(rng, held)
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    scenes = [replace(random_scene(rng), background=background) for _ in range(protocol.references)]
    pictures = [render(Figure(who, clothes, scene)) for scene in scenes]
    known = truth(Figure(who, clothes, scenes[0]))
    return Character(
        f"{FOLDERS[domain]}_{index + 1}",
        domain,
        [prepared(picture, "figure", protocol.masked) for picture in pictures],
        {name: known[name] for name in (*FACE, *GARMENTS)},
        background,
    )


def from_folder(folder: Path, protocol: Protocol) -> list[Character]:
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
            found.append(_from_pictures(path, domain, protocol.references))
    return found


def _from_pictures(folder: Path, domain: str, count: int) -> Character:
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
