"""Which pictures stay, by their tags (§3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import RetrievalError, explain

LISTS = Path(__file__).parent / "tags"
UNWANTED, CLOTHING, TRIVIAL = "unwanted.txt", "clothing.txt", "trivial_clothing.txt"


@dataclass(frozen=True)
class Rules:
    """Tags that decide, as `normalize_tag` writes them.

    unwanted: one of them rejects a picture. clothing: one of them is needed; garments only, without
    the trivial ones such as shoes and accessories.
    """

    unwanted: frozenset[str]
    clothing: frozenset[str]


def load_rules(folder: Path | None = None) -> Rules:
    """Reads the lists of a folder, of which those that are missing are the pack's own.

    Each is a text file with one tag a line; # begins a comment: `unwanted.txt`, `clothing.txt`
    and `trivial_clothing.txt`, whose tags are taken out of the clothing.

    Raises:
        RetrievalError: the folder holds none of the three, or one is not a text file.
    """
    names = (UNWANTED, CLOTHING, TRIVIAL)
    if folder is not None and not any((folder / name).is_file() for name in names):
        raise RetrievalError(
            f"There is no list of tags in '{folder}'; copy {UNWANTED}, {CLOTHING} or {TRIVIAL} "
            f"from '{LISTS}' and edit it."
        )
    lists = []
    for name in names:
        own = folder is None or not (folder / name).is_file()
        lists.append(_read_list((LISTS if own else folder) / name))
    unwanted, clothing, trivial = lists
    return Rules(unwanted, clothing - trivial)


def _read_list(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RetrievalError(
            f"The list of tags '{path}' cannot be read ({explain(error)}); save it as UTF-8 text."
        ) from error
    # A # within a tag, as in "#compass", is part of it.
    tags = (line.split(" #")[0].strip() for line in lines if not line.startswith("#"))
    return frozenset(normalize_tag(tag) for tag in tags if tag)


def normalize_tag(tag: str) -> str:
    """A tag as Danbooru writes it: lower case, underscores, no backslash before a parenthesis."""
    return tag.strip().lower().replace(" ", "_").replace("\\", "")


def find_rejection(
    tags: Sequence[str] | None, characters: Sequence[str], rules: Rules
) -> str | None:
    """Why a picture is left out, or None if it stays.

    tags: normalized; None where the source has none, so that nothing can be said about clothes.
    """
    if tags is not None and not rules.unwanted.isdisjoint(tags):
        return "unwanted tag"
    if len(characters) != 1:
        return "several characters" if characters else "no character tag"
    if tags is not None and rules.clothing.isdisjoint(tags):
        return "no clothing tag"
    return None
