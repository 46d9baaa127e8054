"""Settings of the search, and the rows of its table by name."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..network.controlnet import Guidance

Levels = tuple[int, ...]  # noise levels as timesteps; none: the step's own


@dataclass(frozen=True)
class Setting:
    """One way of carrying references over.

    Attributes:
        layers: that attend to the bank, see `choose_layers`.
        levels, value_levels: noise levels of keys and of values (None: the keys').
        seeds: number of noises that each reference is read with.
        text: that the references are read with, "figure" or "".
        cover: tokens with at most this part inside their mask are left out.
        strength: factor of the bank's tokens in the softmax; 0 for no attention to the bank.
        sharpen: factor of the bank's logits, an inverse temperature.
        top_k: bank's tokens that a place may see, 0 for all.
        own: also see own tokens; False replaces them.
        blend: out = own + blend * (bank's attention - own) instead of one softmax; `gated` by the
            "mass" that the joint softmax gives to the bank, or by the gate of the pull ("figure",
            at layers from the pull's on).
        boost: out = plain + boost * (out - plain).
        match: what decides which of the bank's tokens are seen: attention's logits, or
            similarity of descriptors made of the letters q, k and v.
        adain_qk, adain_v: own queries and keys, or values, get the bank's statistics.
        centred: keys without the mean at their position.
        start, end, fine_start, fine_end: fractions of sampling in which the coarser layers and the
            layers of the finest attention see the bank.
        guidance: rows that retrieve.
        push, push_end, push_every: adds push * (with references - without) in every nth step until
            a fraction of sampling; a third row of the batch.
        alternate: every nth step, the negative row has the prompt, so that guidance acts on the
            references alone.
        negative_text: part of the prompt in the negative row's text.
        pull..: moves x0 towards the references' latents at places matched at `pull_layer` (first
            or last of the decoder's finest attention, or the decoder's first: coarse). pull moves
            the mean of a token's latents, detail (from detail_start to detail_end) the rest;
            pull_mode: means of tokens, or of places that look alike. pull_fade: 1 lets it fall
            linearly to 0 at its end.
            pull_yield: part of the shift against the text's direction that is dropped.
            pull_gate: mass (the part of a place's match that is inside the masks), sharp or none.
        inject..: the same on skip features.
    """

    layers: str = "all"
    levels: Levels = (500,)
    value_levels: Levels | None = None
    seeds: int = 1
    text: str = "figure"
    cover: float = 0.0
    strength: float = 1.0
    sharpen: float = 1.0
    top_k: int = 0
    own: bool = True
    blend: float | None = None
    gated: str = ""
    boost: float = 1.0
    match: str = "attention"
    adain_qk: bool = False
    adain_v: bool = False
    centred: bool = False
    start: float = 0.0
    end: float = 1.0
    fine_start: float = 0.0
    fine_end: float = 1.0
    guidance: Guidance = "cond"
    push: float = 0.0
    push_end: float = 1.0
    push_every: int = 1
    alternate: int = 0
    negative_text: float = 0.0
    pull: float = 0.0
    pull_layer: str = "first"
    pull_levels: Levels = (500,)
    pull_match: str = "q"
    pull_sharpen: float = 3.0
    pull_top: int = 0
    pull_mode: str = "mean"
    pull_gate: str = "mass"
    pull_start: float = 0.0
    pull_end: float = 1.0
    pull_fade: float = 0.0
    pull_yield: float = 0.0
    detail: float = 0.0
    detail_start: float = 0.0
    detail_end: float = 1.0
    inject: float = 0.0
    inject_sites: str = ""
    inject_start: float = 0.0
    inject_end: float = 1.0

    @property
    def acts(self) -> bool:
        return self.strength > 0 or self.pull > 0 or self.detail > 0 or self.inject > 0

    def window(self, fine: bool) -> tuple[float, float]:
        """The part of sampling in which a layer sees the bank."""
        return (self.fine_start, self.fine_end) if fine else (self.start, self.end)

    def describe(self) -> dict[str, Any]:
        """The fields that are not the defaults."""
        plain = asdict(Setting())
        return {name: value for name, value in asdict(self).items() if value != plain[name]}


OFF = Setting(strength=0.0)
PULL = Setting(strength=0.0, pull=1.0, pull_end=0.85, pull_yield=1.0)


def find_level(levels: Levels, timestep: int) -> int:
    """The level nearest to a timestep; the timestep itself if there are none."""
    return min(levels, key=lambda level: (abs(level - timestep), level), default=timestep)


def list_rows() -> dict[str, Setting]:
    """Row's name -> setting; a name is group/fields. What matters most comes first."""
    rows: dict[str, Setting] = {}

    def add(group: str, base: Setting, **values: Sequence[Any]) -> None:
        """One row for each of a field's values."""
        for name, choices in values.items():
            for value in choices:
                rows[f"{group}/{name} {value}"] = replace(base, **{name: value})

    plain, strong = Setting(), Setting(strength=4.0)
    rows["attention/1"], rows["attention/4"] = plain, strong
    for name, setting in list_literature().items():
        rows[f"literature/{name}"] = setting
    alone, joint = PULL, replace(PULL, strength=1.0)
    for group, base in (("pull", alone), ("pull and attention", joint)):
        rows[group] = base
        add(group, base, pull=(0.3, 0.5, 0.7, 0.85, 1.25), pull_end=(0.4, 0.6, 0.7, 0.8, 0.9, 1.0))
        add(group, base, pull_yield=(0.0, 0.5, 1.5), detail=(0.15, 0.3, 0.5, 0.75, 1.0))
        add(f"{group}, to the end", replace(base, pull_end=1.0), detail=(0.5, 1.0))
        add(f"{group}, half", replace(base, pull=0.5), pull_end=(0.6, 0.7, 0.8, 0.9, 1.0))
    add("pull", alone, pull_match=("attention", "k", "v", "qk", "kv", "qkv"))
    add("pull", alone, pull_layer=("last", "coarse", "input"))
    add("pull, last", replace(alone, pull_layer="last"), pull_match=("k", "qk"))
    coarse = replace(alone, pull_layer="coarse", pull_match="k")
    rows["pull, coarse"] = coarse
    add("pull, coarse, detail until 0.4", replace(coarse, detail_end=0.4), detail=(0.5, 1.0))
    add("pull", alone, pull_sharpen=(0.5, 1.0, 2.0, 4.0, 6.0, 10.0), pull_top=(1, 4, 16))
    add("pull", alone, pull_levels=((50,), (100,), (200,), (300,), (700,), (900,), (100, 500), ()))
    add("pull", alone, pull_start=(0.1, 0.2, 0.3, 0.5), pull_fade=(0.5, 1.0))
    add("pull", alone, pull_gate=("none", "sharp"), pull_mode=("alike",), cover=(0.25, 0.5, 0.75))
    add("pull", alone, text=("",))
    early = replace(alone, detail=1.0)
    add("detail until", early, detail_end=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7))
    add("detail 0.5 from 0.2", replace(alone, detail=0.5, detail_start=0.2), detail_end=(0.5, 0.7))
    add("detail until 0.4", replace(early, detail_end=0.4), pull_yield=(0.0, 0.5, 1.5))
    both = replace(joint, detail=1.0, detail_end=0.6)
    add("pull, detail and attention", both, detail_end=(0.4, 0.6, 0.85), pull_yield=(0.0,))
    add("pull, detail and attention", both, layers=("decoder",), strength=(2.0,))
    both = replace(both, pull_layer="coarse", pull_match="k")
    add("pull, detail and attention, coarse", both, detail_end=(0.4, 0.6, 0.85), strength=(0.5,))
    add("pull and attention", joint, strength=(0.25, 0.5, 2.0, 4.0), end=(0.3, 0.5, 0.7))
    add("pull and attention", joint, layers=("decoder", "middle and decoder"), adain_v=(True,))
    shape = replace(joint, end=0.5, fine_end=0.5)
    add("pull and early attention", shape, strength=(1.0, 2.0, 4.0))
    matched = replace(joint, layers="decoder", match="q", sharpen=3.0, gated="figure")
    add("matched attention", replace(matched, pull=0.0), blend=(0.5, 1.0, 1.5))
    add("pull and matched attention", matched, blend=(0.5, 1.0))
    sites = ("input_0", "input_1", "input_2", "input_0 input_1 input_2", "input_3 input_4")
    add("inject", replace(alone, pull=0.0, inject=0.5), inject_sites=sites)
    add("strength", plain, strength=(0.25, 0.5, 2.0, 8.0, 16.0))
    add("layers", plain, layers=("decoder", "middle", "encoder", "middle and decoder"))
    levels = ((50,), (100,), (200,), (300,), (700,), (900,), (100, 300, 500, 700, 900), ())
    add("levels", plain, levels=levels)
    add("levels, strength 4", strong, levels=levels)
    add("values' level", plain, value_levels=((50,), (200,), ()))
    add("keys of the step", replace(plain, levels=()), value_levels=((50,), (200,), (500,)))
    add("seeds", plain, seeds=(2, 4), text=("",), cover=(0.25, 0.5, 0.75))
    add("sharpen", plain, sharpen=(0.5, 1.5, 2.0, 3.0), top_k=(1, 4, 16))
    add("sharpen, strength 4", strong, sharpen=(1.5, 2.0, 3.0), top_k=(1, 4, 16))
    add("blend", plain, blend=(0.2, 0.4, 0.7))
    add("gated blend", replace(plain, gated="mass"), blend=(1.0, 1.5, 2.0, 3.0))
    add("boost", plain, boost=(1.5, 2.0, 3.0))
    add("match", replace(plain, sharpen=3.0, blend=0.5), match=("q", "k", "v", "qk", "qkv"))
    add("AdaIN", plain, adain_qk=(True,), adain_v=(True,), centred=(True,))
    add("schedule, coarse", plain, end=(0.3, 0.6), start=(0.3, 0.6))
    add("schedule, fine", plain, fine_end=(0.3, 0.6), fine_start=(0.3, 0.6))
    for end in (0.3, 0.5, 0.7):
        rows[f"schedule/until {end}, strength 4"] = replace(strong, end=end, fine_end=end)
        rows[f"schedule/from {end}, strength 4"] = replace(strong, start=end, fine_start=end)
    add("guidance", plain, guidance=("both",))
    add("guidance, strength 4", strong, guidance=("both",))
    add("push, a third row", plain, push=(1.0, 2.0, 4.0))
    add("push, a third row", replace(plain, push=4.0), push_end=(0.3,), push_every=(4, 8))
    add("prompt in the negative row", plain, alternate=(2, 4), negative_text=(0.25, 0.5))
    return rows


def list_literature() -> dict[str, Setting]:
    """Methods by name, as near as their descriptions allow."""
    return {
        "reference-only control": Setting(levels=()),
        "MasaCtrl, decoder from 0.1": Setting("decoder", (), own=False, start=0.1, fine_start=0.1),
        "MasaCtrl, decoder from 0.3": Setting("decoder", (), own=False, start=0.3, fine_start=0.3),
        "StyleAligned": Setting(levels=(), adain_qk=True),
        "StyleAligned, values too": Setting(levels=(), adain_qk=True, adain_v=True),
        "Visual Style Prompting": Setting("output_3", (), own=False, guidance="cond"),
        "ConsiStory, keys and values": Setting("decoder", (), cover=0.5),
        "ConsiStory, features injected": Setting(
            "decoder", (), cover=0.5, inject=0.5, inject_sites="input_3 input_4", inject_end=0.6
        ),
        "StoryDiffusion": Setting("decoder", (), end=0.8, fine_end=0.8),
        "cross-image attention": Setting(
            "decoder", (), own=False, sharpen=1.67, start=0.1, fine_start=0.1, push=2.5
        ),
    }


def draw_combinations(count: int, seed: int) -> dict[str, Setting]:
    """`count` random combinations of the fields' promising values."""
    rng = random.Random(seed)
    rows = {}
    for _ in range(count):
        values = {name: rng.choice(choices) for name, choices in COMBINED.items()}
        rows[f"random/{rng.getrandbits(32):08x}"] = Setting(**values)
    return rows


COMBINED: dict[str, Sequence[Any]] = {
    "layers": ("all", "decoder"),
    "strength": (0.0, 0.0, 0.5, 1.0, 2.0, 4.0),
    "end": (0.3, 0.5, 0.7, 1.0),
    "fine_end": (0.3, 0.5, 0.7, 1.0),
    "cover": (0.0, 0.25, 0.5),
    "pull": (0.3, 0.5, 0.7, 1.0, 1.25),
    "pull_match": ("q", "q", "k", "qk"),
    "pull_layer": ("first", "first", "last"),
    "pull_sharpen": (2.0, 3.0, 5.0, 10.0),
    "pull_levels": ((200,), (500,), ()),
    "pull_start": (0.0, 0.0, 0.0, 0.1, 0.2),
    "pull_end": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "pull_fade": (0.0, 0.0, 0.5),
    "pull_yield": (0.0, 0.5, 1.0, 1.0, 1.5),
    "detail": (0.0, 0.0, 0.2, 0.4, 0.7, 1.0),
    "detail_start": (0.0, 0.0, 0.2),
    "detail_end": (0.3, 0.4, 0.5, 0.6, 0.8),
}


def choose_rows(rows: dict[str, Setting], part: int, parts: int) -> Iterator[tuple[str, Setting]]:
    """Every `parts`-th row, from the `part`-th on."""
    yield from list(rows.items())[part::parts]
