"""Paper dolls as the characters of an evaluation, and the prompts of the evaluation."""

from __future__ import annotations

import numpy as np

from ..evaluate.characters import FOLDERS, Character
from ..evaluate.protocol import HELD_OUT, IN_DOMAIN, Protocol
from .cases import prepare_rendering, render_sources
from .judge import FACE, GARMENTS, list_truth
from .world import BACKGROUNDS, pick, random_identity, random_outfit

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
    background = pick(rng, BACKGROUNDS)
    pictures = render_sources(who, clothes, background, protocol.references, rng)
    known = list_truth(pictures[0].figure)
    return Character(
        f"{FOLDERS[domain]}_{index + 1}",
        domain,
        [prepare_rendering(picture, "figure", protocol.masked) for picture in pictures],
        {name: known[name] for name in (*FACE, *GARMENTS, "background")},
    )
