"""Test cases on characters held out of training: references, prompts, and what must come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..data import Sample, cut_reference
from ..data.prepare import PreparedReference
from ..data.sample import Concept
from .draw import Rendering, render
from .judge import FACE, GARMENTS, list_truth
from .world import (
    BACKGROUNDS,
    SIZE,
    Figure,
    Identity,
    Outfit,
    random_identity,
    random_outfit,
    random_scene,
)

REFERENCES = 4


@dataclass(frozen=True, eq=False)
class Case:
    """One conditioning: the prompt, the references' pictures, and the truth to be matched.

    wanted: the attributes that must come from the references. said: those that the prompt names.
    reference_background: the one background of all references, drawn independently of the prompt.
    """

    prompt: str
    references: list[PreparedReference]
    wanted: dict[str, str]
    said: dict[str, str]
    reference_background: str
    sources: list[Rendering]


def prepare_rendering(
    rendering: Rendering, concept: Concept, masked: bool = False
) -> PreparedReference:
    """A rendered figure as a reference for `concept`, with its background unless `masked`."""
    sample = Sample(rendering.image, rendering.mask, rendering.head_box)
    cut = cut_reference(sample, concept, SIZE, remove_background=masked)
    image = torch.from_numpy(cut.image.copy()).movedim(-1, 0).float() / 255
    mask = None if cut.mask is None else torch.from_numpy(cut.mask).float()
    return PreparedReference(image, mask, concept, 1.0)


def _pictures(
    who: Identity, clothes: Outfit, background: str, count: int, rng: np.random.Generator
) -> list[Rendering]:
    scenes = [replace(random_scene(rng), background=background) for _ in range(count)]
    return [render(Figure(who, clothes, scene)) for scene in scenes]


def make_character_case(
    seed: int, index: int, count: int = REFERENCES, masked: bool = False
) -> Case:
    """Case `index` of the same-character task: `count` whole figures of one held-out character."""
    rng = np.random.default_rng([seed, index, 10])
    who, clothes = random_identity(rng, True), random_outfit(rng, True)
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    scene = random_scene(rng)
    sources = _pictures(who, clothes, background, count, rng)
    values = list_truth(Figure(who, clothes, scene))
    return Case(
        ", ".join(scene.tags()),
        [prepare_rendering(source, "figure", masked) for source in sources],
        {name: values[name] for name in (*FACE, *GARMENTS)},
        {name: values[name] for name in ("pose", "expression", "background")},
        background,
        sources,
    )


def make_composition_case(seed: int, index: int, masked: bool = False) -> Case:
    """Case `index` of concept composition: two faces of one character, two bodies of another.

    Both are held out of training, and both wear or have something else than what is wanted.
    """
    rng = np.random.default_rng([seed, index, 11])
    who, clothes = random_identity(rng, True), random_outfit(rng, True)
    other, others_clothes = random_identity(rng, True), random_outfit(rng, True)
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    scene = random_scene(rng)
    faces = _pictures(who, others_clothes, background, 2, rng)
    bodies = _pictures(other, clothes, background, 2, rng)
    values = list_truth(Figure(who, clothes, scene))
    references = [prepare_rendering(face, "face", masked) for face in faces]
    references += [prepare_rendering(body, "clothes", masked) for body in bodies]
    return Case(
        ", ".join(scene.tags()),
        references,
        {name: values[name] for name in (*FACE, *GARMENTS)},
        {name: values[name] for name in ("pose", "expression", "background")},
        background,
        [*faces, *bodies],
    )


def drop_prompt(case: Case) -> Case:
    """The same conditioning with an empty prompt."""
    return replace(case, prompt="", said={})


def list_references(cases: Sequence[Case]) -> list[list[PreparedReference]]:
    """The references of each case, as `generate.encode_groups` takes them."""
    return [case.references for case in cases]
