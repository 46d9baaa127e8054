"""The pictures to generate: characters, prompts, seeds and samples (§5.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import RetrievalError

IN_DOMAIN, HELD_OUT = "in-domain", "held-out"

# Table 2: five sets of Danbooru tags "from unused samples", as the paper prints them.
RETRIBOORU = (
    "1girl, bare_shoulders, blue_eyes, blush, detached_sleeves, grin, headset, long_hair, "
    "looking_at_viewer, necktie, pointing, pointing_at_self, smile, solo, twintails",
    "1girl, arms_behind_back, bare_legs, bare_shoulders, brown_eyes, brown_hair, collarbone, "
    "hair_ornament, high_ponytail, looking_at_viewer, sailor_collar, school_swimsuit, smile, solo, "
    "swimsuit, swimsuit_under_clothes, twitter_username",
    "adjusting_clothes, adjusting_hat, cape, flat_cap, flower, frown, green_eyes, grey_legwear, "
    "hand_on_headwear, hat, leaf, lily_(flower), loafers, looking_at_viewer, male_focus, "
    "peaked_cap, plant, sheath, sheathed, shoes, shorts, silver_hair, sitting, socks, solo, sword, "
    "weapon",
    "1girl, bangs, blonde_hair, blue_eyes, choker, cowboy_shot, cravat, flat_chest, frills, "
    "long_hair, long_skirt, ribbon_choker, shirt, skirt, smile, solo, very_long_hair",
    "1girl, bangs, bird, bird_wings, black_gloves, black_hair, bodystocking, closed_mouth, "
    "collared_shirt, eyebrows_visible_through_hair, feathered_wings, fingerless_gloves, from_side, "
    "gloves, grey_hair, grey_neckwear, grey_shirt, grey_shorts, hair_between_eyes, head_wings, "
    "interlocked_fingers, light_frown, long_hair, looking_to_the_side, multicolored_hair, necktie, "
    "orange_hair, pocket, shirt, shorts, sidelocks, solo, standing, wings, yellow_eyes",
)


@dataclass(frozen=True)
class Protocol:
    """The numbers of §5.3, which make 5000 pictures a method and weight.

    Attributes:
        in_domain, held_out: how many characters of each kind.
        references: pictures of a character given to a method.
        prompts: texts, named P1, P2, ... in their order.
        seeds: runs of one character and prompt, seeded `seed` to `seed + seeds - 1`.
        samples: pictures a run.
        masked: references come without their background.

    Raises:
        RetrievalError: a number below 1, no character, fewer than two pictures of one character
            and prompt, no prompt, or an empty one.
    """

    in_domain: int = 40
    held_out: int = 10
    references: int = 4
    prompts: tuple[str, ...] = RETRIBOORU
    seeds: int = 5
    samples: int = 4
    seed: int = 1
    masked: bool = False

    def __post_init__(self) -> None:
        for name in ("references", "seeds", "samples"):
            if getattr(self, name) < 1:
                raise RetrievalError(
                    f"The protocol has {getattr(self, name)} {name}; give 1 or more."
                )
        if self.in_domain < 0 or self.held_out < 0 or not self.in_domain + self.held_out:
            raise RetrievalError(
                f"The protocol has {self.in_domain} in-domain and {self.held_out} held-out "
                "characters; give at least one in all."
            )
        if not 0 <= self.seed < 2**31:
            raise RetrievalError(f"The seed is {self.seed}; give one from 0 to 2147483647.")
        if self.seeds * self.samples < 2:
            raise RetrievalError(
                "One seed with one sample leaves no pair of pictures to measure diversity on; give "
                "2 seeds or 2 samples."
            )
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise RetrievalError(
                "The protocol has an empty prompt, or none; give each prompt a line of text."
            )

    def runs(self, characters: Sequence[str]) -> Iterator[Run]:
        """Every run for characters of these names, in a fixed order."""
        for character in characters:
            for number, prompt in enumerate(self.prompts, 1):
                for seed in range(self.seed, self.seed + self.seeds):
                    yield Run(character, f"P{number}", prompt, seed, self.samples)


@dataclass(frozen=True)
class Run:
    """One conditioning and one seed: `samples` pictures, one row of the results."""

    character: str
    prompt_name: str
    prompt: str
    seed: int
    samples: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.character, self.prompt_name, self.seed
