"""The paper-doll world's truth: identities, outfits, scenes, and which are held out of training."""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

SIZE = 64

Colour = tuple[int, int, int]

HAIR_STYLES = (
    "bob",
    "long hair",
    "twintails",
    "side ponytail",
    "spiky hair",
    "double buns",
    "afro",
    "mohawk",
)
HAIR_COLOURS: dict[str, Colour] = {
    "black": (38, 34, 44),
    "brown": (122, 74, 40),
    "blonde": (242, 208, 92),
    "red": (204, 46, 40),
    "blue": (48, 92, 210),
    "pink": (246, 140, 192),
    "green": (58, 162, 84),
    "white": (236, 236, 242),
}
EYE_COLOURS: dict[str, Colour] = {
    "blue": (40, 100, 235),
    "green": (34, 172, 76),
    "brown": (124, 70, 26),
    "red": (220, 30, 44),
    "purple": (156, 60, 214),
    "gold": (240, 184, 24),
}
SKIN_TONES: dict[str, Colour] = {
    "pale": (255, 226, 204),
    "tan": (228, 176, 130),
    "brown": (164, 108, 72),
    "dark": (98, 64, 46),
}
UPPER_KINDS = ("t-shirt", "tank top", "sweater", "open jacket", "poncho", "sailor shirt")
LOWER_KINDS = ("trousers", "shorts", "mini skirt", "long skirt", "overalls")
GARMENT_COLOURS: dict[str, Colour] = {
    "red": (206, 38, 44),
    "orange": (246, 138, 34),
    "yellow": (250, 226, 64),
    "green": (46, 150, 62),
    "blue": (42, 88, 204),
    "purple": (138, 58, 176),
    "white": (246, 246, 246),
    "black": (46, 46, 54),
}
PATTERNS = ("plain", "stripes", "dots", "check")
POSES = (
    "standing",
    "waving",
    "arms up",
    "hands on hips",
    "arms spread",
    "sitting",
    "jumping",
    "handstand",
)
EXPRESSIONS = ("smile", "laughing", "sad", "angry", "surprised")
BACKGROUNDS = ("studio", "sky", "beach", "forest", "city", "night", "room", "sunset")
BACKGROUND_VARIANTS = 64
LARGEST_SHIFT = 2

HELD_OUT_PERCENT = 20


@dataclass(frozen=True)
class Identity:
    """The character: given by references only."""

    hair_style: str
    hair_colour: str
    eye_colour: str
    skin: str


@dataclass(frozen=True)
class Outfit:
    """The clothes: given by references only."""

    upper: str
    upper_colour: str
    upper_pattern: str
    lower: str
    lower_colour: str


@dataclass(frozen=True)
class Scene:
    """Pose, expression and background, which the prompt may name, and what no input controls.

    mirror: the figure is flipped. shift: (right, down) in pixels, each -2..2. background_seed:
    which variant of the background, 0..63.
    """

    pose: str
    expression: str
    background: str
    mirror: bool = False
    shift: tuple[int, int] = (0, 0)
    background_seed: int = 0

    def tags(self) -> list[str]:
        """The prompt's tags, in the order pose, expression, background."""
        return [self.pose, self.expression, self.background]


@dataclass(frozen=True)
class Figure:
    identity: Identity
    outfit: Outfit
    scene: Scene


def is_held_out(value: Identity | Outfit) -> bool:
    """Whether training never sees this combination of attributes."""
    kind = "identity" if isinstance(value, Identity) else "outfit"
    digest = hashlib.sha256("|".join((kind, *astuple(value))).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def random_identity(rng: np.random.Generator, held_out: bool | None = None) -> Identity:
    """An identity, uniform. held_out: among the held-out ones, the others, or (None) all."""
    while True:
        identity = Identity(
            pick(rng, HAIR_STYLES),
            pick(rng, HAIR_COLOURS),
            pick(rng, EYE_COLOURS),
            pick(rng, SKIN_TONES),
        )
        if held_out is None or is_held_out(identity) == held_out:
            return identity


def random_outfit(rng: np.random.Generator, held_out: bool | None = None) -> Outfit:
    """An outfit whose two colours differ, half of them plain; held_out as in `random_identity`."""
    while True:
        pattern = "plain" if rng.random() < 0.5 else pick(rng, PATTERNS[1:])
        upper_colour = pick(rng, GARMENT_COLOURS)
        others = [colour for colour in GARMENT_COLOURS if colour != upper_colour]
        outfit = Outfit(
            pick(rng, UPPER_KINDS), upper_colour, pattern, pick(rng, LOWER_KINDS),
            pick(rng, others),
        )  # fmt: skip
        if held_out is None or is_held_out(outfit) == held_out:
            return outfit


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene, uniform in every attribute."""
    right, down = rng.integers(-LARGEST_SHIFT, LARGEST_SHIFT + 1, 2).tolist()
    return Scene(
        pick(rng, POSES),
        pick(rng, EXPRESSIONS),
        pick(rng, BACKGROUNDS),
        bool(rng.integers(2)),
        (right, down),
        int(rng.integers(BACKGROUND_VARIANTS)),
    )


def pick(rng: np.random.Generator, names: Any) -> str:
    choices = tuple(names)
    return choices[int(rng.integers(len(choices)))]
