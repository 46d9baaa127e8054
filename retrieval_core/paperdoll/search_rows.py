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
            mass that the joint softmax gives to the bank.
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
            or last of the decoder's finest attention). pull_mode: means of tokens, all of it, or
            statistics of places that look alike. pull_gate: mass, sharp or none.
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
    gated: bool = False
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
    pull_layer: str = "last"
    pull_levels: Levels = (500,)
    pull_match: str = "attention"
    pull_sharpen: float = 1.0
    pull_top: int = 0
    pull_mode: str = "mean"
    pull_gate: str = "mass"
    pull_start: float = 0.0
    pull_end: float = 1.0
    inject: float = 0.0
    inject_sites: str = ""
    inject_start: float = 0.0
    inject_end: float = 1.0

    @property
    def acts(self) -> bool:
        return self.strength > 0 or self.pull > 0 or self.inject > 0

    def window(self, fine: bool) -> tuple[float, float]:
        """The part of sampling in which a layer sees the bank."""
        return (self.fine_start, self.fine_end) if fine else (self.start, self.end)

    def describe(self) -> dict[str, Any]:
        """The fields that are not the defaults."""
        plain = asdict(Setting())
        return {name: value for name, value in asdict(self).items() if value != plain[name]}


OFF = Setting(strength=0.0)


def find_level(levels: Levels, timestep: int) -> int:
    """The level nearest to a timestep; the timestep itself if there are none."""
    return min(levels, key=lambda level: (abs(level - timestep), level), default=timestep)


def list_rows() -> dict[str, Setting]:
    """Row's name -> setting; a name is group/value."""
    rows: dict[str, Setting] = {}

    def add(group: str, base: Setting | None = None, **values: Any) -> None:
        """One row for each of a field's values, or one of the group's name."""
        for field_, choices in values.items():
            for value in choices:
                rows[f"{group}/{field_} {value}"] = replace(base or Setting(), **{field_: value})

    add("strength", strength=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0))
    add("layers", layers=("decoder", "middle", "encoder", "middle and decoder"))
    add("layers at 4", Setting(strength=4.0), layers=("decoder", "middle and decoder"))
    levels = ((0,), (50,), (100,), (200,), (300,), (700,), (900,), (100, 300, 500, 700, 900), ())
    add("levels", levels=levels)
    add("levels at 4", Setting(strength=4.0), levels=levels)
    add("value levels", value_levels=((50,), (200,), ()))
    add("own level keys", Setting(levels=()), value_levels=((50,), (200,), (500,)))
    add("seeds", seeds=(2, 4))
    add("text", text=("",))
    add("cover", cover=(0.25, 0.5, 0.75))
    add("sharpen", sharpen=(0.5, 1.5, 2.0, 3.0, 5.0))
    add("sharpen at 4", Setting(strength=4.0), sharpen=(1.5, 2.0, 3.0, 5.0))
    add("top", top_k=(1, 2, 4, 8))
    add("top at 4", Setting(strength=4.0), top_k=(1, 2, 4, 8))
    add("blend", blend=(0.1, 0.2, 0.3, 0.5, 0.7, 1.0))
    add("gated blend", Setting(gated=True), blend=(0.5, 1.0, 1.5, 2.0, 3.0))
    add("boost", boost=(1.5, 2.0, 3.0, 4.0))
    add("match", match=("q", "k", "v", "qk", "kv", "qkv"))
    add("match sharp", Setting(sharpen=3.0), match=("q", "k", "v", "qk", "kv", "qkv"))
    add("AdaIN", adain_qk=(True,), adain_v=(True,))
    add("centred", centred=(True,))
    add("shape early", fine_end=(0.0, 0.3, 0.6), end=(0.3, 0.6))
    add("detail late", fine_start=(0.2, 0.4, 0.6), start=(0.3, 0.6, 1.0))
    add("until", **{"end": ()})
    for end in (0.3, 0.5, 0.7, 0.9):
        rows[f"schedule/until {end}"] = Setting(end=end, fine_end=end)
        rows[f"schedule/until {end} at 4"] = Setting(end=end, fine_end=end, strength=4.0)
        rows[f"schedule/from {end}"] = Setting(start=end, fine_start=end)
        rows[f"schedule/from {end} at 4"] = Setting(start=end, fine_start=end, strength=4.0)
    add("guidance", guidance=("both",))
    add("guidance at 4", Setting(strength=4.0), guidance=("both",))
    add("push", push=(0.5, 1.0, 2.0, 3.0, 4.0))
    add("push early", Setting(push=2.0), push_end=(0.2, 0.4, 0.6))
    add("push seldom", Setting(push=4.0), push_every=(2, 4, 8))
    add("alternate", alternate=(2, 3, 4))
    add("negative text", negative_text=(0.25, 0.5, 0.75))
    for name, setting in list_literature().items():
        rows[f"literature/{name}"] = setting
    alone = Setting(strength=0.0)
    for base, name in ((alone, "pull alone"), (Setting(), "pull")):
        add(name, base, pull=(0.1, 0.2, 0.4, 0.7, 1.0))
        for match in ("attention", "q", "k", "v", "qk", "qkv"):
            for layer in ("first", "last"):
                for sharpen in (1.0, 3.0):
                    rows[f"{name} by {match}, {layer}, {sharpen:g}"] = replace(
                        base, pull=0.3, pull_match=match, pull_layer=layer, pull_sharpen=sharpen
                    )
        add(f"{name} 0.3", replace(base, pull=0.3), pull_mode=("all", "statistics"))
        add(f"{name} 0.3", replace(base, pull=0.3), pull_gate=("none", "sharp"))
        add(f"{name} 0.3", replace(base, pull=0.3), pull_start=(0.2, 0.4, 0.6))
        add(f"{name} 0.3", replace(base, pull=0.3), pull_end=(0.3, 0.5, 0.7))
        add(f"{name} 0.3", replace(base, pull=0.3), pull_levels=((50,), (200,), (300,), ()))
        add(f"{name} 0.3", replace(base, pull=0.3), pull_top=(1, 4))
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
        "StoryDiffusion": Setting("decoder", (), seeds=1, fine_end=0.8, end=0.8),
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
    "layers": ("all", "decoder", "middle and decoder"),
    "levels": ((100,), (200,), (300,), (500,), ()),
    "strength": (0.0, 0.5, 1.0, 2.0, 4.0, 8.0),
    "sharpen": (1.0, 1.5, 2.0, 3.0),
    "top_k": (0, 0, 4),
    "cover": (0.0, 0.5),
    "boost": (1.0, 1.5, 2.0),
    "adain_v": (False, False, True),
    "start": (0.0, 0.0, 0.2),
    "end": (0.6, 0.8, 1.0, 1.0),
    "pull": (0.0, 0.2, 0.4, 0.7),
    "pull_match": ("attention", "q", "k", "qk"),
    "pull_layer": ("first", "last"),
    "pull_sharpen": (1.0, 2.0, 4.0),
    "pull_levels": ((100,), (300,), (500,), ()),
    "pull_mode": ("mean", "all"),
    "pull_start": (0.0, 0.1, 0.3),
    "pull_end": (0.5, 0.8, 1.0),
}


def choose_rows(rows: dict[str, Setting], part: int, parts: int) -> Iterator[tuple[str, Setting]]:
    """Every `parts`-th row, from the `part`-th on."""
    yield from list(rows.items())[part::parts]
