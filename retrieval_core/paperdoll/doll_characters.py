"""Paper dolls as the characters of an evaluation, and the prompts of the evaluation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..evaluate.characters import FOLDERS, Character
from ..evaluate.protocol import HELD_OUT, IN_DOMAIN, Protocol
from .cases import prepare_rendering
from .draw import render
from .judge import FACE, GARMENTS, list_truth
from .world import BACKGROUNDS, Figure, random_identity, random_outfit, random_scene

# As in Table 2, prompts leave some attributes open, so that diversity can be measured.
PROMPTS = (
    "waving, smile, beach",
    "sitting, sad, night",
    "arms up, laughing",
    "jumping, forest",
    "surprised, city",
)


def draw_characters(protocol: Protocol) -> list[Character]:
    """Paper dolls of training's identities and outfits in new scenes, then held-out ones."""
    counts = ((IN_DOMAIN, protocol.in_domain), (HELD_OUT, protocol.held_out))
    return [_draw(protocol, domain, index) for domain, count in counts for index in range(count)]


def _draw(protocol: Protocol, domain: str, index: int) -> Character:
    held = domain == HELD_OUT
    rng = np.random.default_rng([protocol.seed, index, 20 + held])
    who, clothes = random_identity(rng, held), random_outfit(rng, held)
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    scenes = [replace(random_scene(rng), background=background) for _ in range(protocol.references)]
    pictures = [render(Figure(who, clothes, scene)) for scene in scenes]
    known = list_truth(Figure(who, clothes, scenes[0]))
    return Character(
        f"{FOLDERS[domain]}_{index + 1}",
        domain,
        [prepare_rendering(picture, "figure", protocol.masked) for picture in pictures],
        {name: known[name] for name in (*FACE, *GARMENTS, "background")},
    )
