"""Test cases on characters held out of training: references, prompts and expected attributes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..data import Sample, cut_reference
from ..data.prepare import PreparedReference
from ..data.sample import Concept
from . import world
from .draw import Rendering, render
from .judge import FACE, GARMENTS, SCENE, Attributes, list_truth
from .world import Figure

REFERENCES = 4


@dataclass(frozen=True, eq=False)
class Case:
    """One conditioning: the prompt, the references, and the true attributes.

    wanted: the attributes that must come from the references. said: those that the prompt names.
    reference_background: shared by all references, drawn independently of the prompt.
    """

    prompt: str
    references: list[PreparedReference]
    wanted: Attributes
    said: Attributes
    reference_background: str
    sources: list[Rendering]


def prepare_rendering(
    rendering: Rendering, concept: Concept, masked: bool = False
) -> PreparedReference:
    """A rendered figure as a reference for `concept`, with its background unless `masked`."""
    sample = Sample(rendering.image, rendering.mask, rendering.head_box)
    cut = cut_reference(sample, concept, world.SIZE, remove_background=masked)
    image = torch.from_numpy(cut.image.copy()).movedim(-1, 0).float() / 255
    mask = None if cut.mask is None else torch.from_numpy(cut.mask).float()
    return PreparedReference(image, mask, concept, 1.0)


def render_sources(
    who: world.Identity,
    clothes: world.Outfit,
    background: str,
    count: int,
    rng: np.random.Generator,
) -> list[Rendering]:
    """One character in `count` random scenes with one background."""
    scenes = [replace(world.random_scene(rng), background=background) for _ in range(count)]
    return [render(Figure(who, clothes, scene)) for scene in scenes]


def _make_case(
    target: Figure, sources: list[Rendering], concepts: tuple[Concept, ...], masked: bool
) -> Case:
    """The case of drawing `target`, from one reference per source and concept."""
    values = list_truth(target)
    return Case(
        ", ".join(target.scene.tags()),
        [prepare_rendering(*pair, masked) for pair in zip(sources, concepts, strict=True)],
        {name: values[name] for name in (*FACE, *GARMENTS)},
        {name: values[name] for name in SCENE},
        sources[0].figure.scene.background,
        sources,
    )


def make_character_case(seed: int, index: int, masked: bool = False) -> Case:
    """Case `index` of the same-character task: four whole figures of one held-out character."""
    rng = np.random.default_rng([seed, index, 10])
    who, clothes = world.random_identity(rng, True), world.random_outfit(rng, True)
    background, scene = world.pick(rng, world.BACKGROUNDS), world.random_scene(rng)
    sources = render_sources(who, clothes, background, REFERENCES, rng)
    return _make_case(Figure(who, clothes, scene), sources, ("figure",) * REFERENCES, masked)


def make_composition_case(seed: int, index: int, masked: bool = False) -> Case:
    """Case `index` of concept composition: two faces of one character, two bodies of another.

    Both are held out of training. The unrequested attributes of each (the first one's clothes, the
    second one's face) are drawn independently of the target's.
    """
    rng = np.random.default_rng([seed, index, 11])
    who, clothes = world.random_identity(rng, True), world.random_outfit(rng, True)
    other, others_clothes = world.random_identity(rng, True), world.random_outfit(rng, True)
    background, scene = world.pick(rng, world.BACKGROUNDS), world.random_scene(rng)
    faces = render_sources(who, others_clothes, background, 2, rng)
    bodies = render_sources(other, clothes, background, 2, rng)
    concepts = ("face", "face", "clothes", "clothes")
    return _make_case(Figure(who, clothes, scene), [*faces, *bodies], concepts, masked)


def drop_prompt(case: Case) -> Case:
    """The same conditioning with an empty prompt."""
    return replace(case, prompt="", said={})
