"""The two tasks of §3.3: which references a target gets, and how both are varied (§4.3, §5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from ..errors import RetrievalError
from .augment import Augmentation, recolour
from .concepts import cut_reference, find_figure_region
from .placing import mask_box, place_picture, place_region
from .sample import NEUTRAL, Colour, Concept, Reference, Sample


@dataclass(frozen=True)
class TaskOptions:
    """size: side of targets and references in pixels. The probabilities are 0 to 1:

    text_drop: of no tags (§5.4's default). reference_drop: of no references at all.
    remove_background: of a reference's background being filled (the paper's number is lost in
    the text at hand). random_fill: padding colours at random, else neutral.
    vary_count: draw the number of references from 1 up instead of always the full number.
    target, source: augmentation of targets and of references, drawn independently.
    """

    size: int = 64
    text_drop: float = 0.5
    reference_drop: float = 0.05
    remove_background: float = 0.5
    random_fill: bool = True
    vary_count: bool = False
    target: Augmentation = field(default_factory=Augmentation)
    source: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise RetrievalError(f"The image size is {self.size}; it must be 1 pixel or more.")
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, float) and not 0 <= value <= 1:
                raise RetrievalError(f"The {option.name} probability is {value}; give 0 to 1.")


@dataclass(frozen=True, eq=False)
class TrainingItem:
    """target: uint8 [S, S, 3]. content: bool [S, S], False in the padding. face: bool [S, S],
    True in the head box (all False without one); lies within `content`.
    tags: empty where the text was dropped. references: empty where they were dropped.
    """

    target: np.ndarray
    content: np.ndarray
    face: np.ndarray
    tags: list[str]
    references: list[Reference]


def draw_same_character(
    samples: Sequence[Sample],
    target_index: int,
    rng: np.random.Generator,
    options: TaskOptions | None = None,
    *,
    count: int = 4,
    indices: Sequence[int] | None = None,
) -> TrainingItem:
    """Same-character task: `count` whole figures of the target's character.

    indices: samples that may be references, all by default. The target never is; where there
    are fewer than `count` others, some are drawn more than once.
    Raises RetrievalError where no other sample is left.
    """
    wanted: list[tuple[Concept, int, Sequence[int]]] = [
        ("figure", count, range(len(samples)) if indices is None else indices)
    ]
    return _item(samples, target_index, rng, options or TaskOptions(), wanted)


def draw_composition(
    samples: Sequence[Sample],
    target_index: int,
    rng: np.random.Generator,
    options: TaskOptions | None = None,
    *,
    faces: int = 2,
    bodies: int = 2,
    face_indices: Sequence[int] | None = None,
    body_indices: Sequence[int] | None = None,
) -> TrainingItem:
    """Concept composition: `faces` faces and `bodies` bodies, sampled separately (§3.3).

    face_indices, body_indices: samples with the target's face and with its clothes, all by
    default; those without a head box are passed over. Otherwise like `draw_same_character`.
    """
    every = range(len(samples))
    headed = [i for i in every if samples[i].head_box is not None]
    pools = [headed if p is None else [i for i in p if samples[i].head_box is not None]
             for p in (face_indices, body_indices)]  # fmt: skip
    wanted: list[tuple[Concept, int, Sequence[int]]] = [
        ("face", faces, pools[0]),
        ("clothes", bodies, pools[1]),
    ]
    return _item(samples, target_index, rng, options or TaskOptions(), wanted)


def _item(
    samples: Sequence[Sample],
    target_index: int,
    rng: np.random.Generator,
    options: TaskOptions,
    wanted: list[tuple[Concept, int, Sequence[int]]],
) -> TrainingItem:
    if not 0 <= target_index < len(samples):
        raise RetrievalError(
            f"The target's index is {target_index}, and there are {len(samples)} samples."
        )
    target = samples[target_index]
    tags = [] if rng.random() < options.text_drop else list(target.tags)
    image, content, face = _target(target, rng, options)
    drop = rng.random() < options.reference_drop
    references = []
    for concept, count, pool in wanted:
        for index in _draw(target_index, pool, count, concept, rng, options.vary_count):
            references.append(_source(samples[index], concept, rng, options))
    return TrainingItem(image, content, face, tags, [] if drop else references)


def _draw(
    target_index: int,
    pool: Sequence[int],
    count: int,
    concept: Concept,
    rng: np.random.Generator,
    vary_count: bool,
) -> list[int]:
    """Indices of the references, all different where there are enough."""
    others = [index for index in pool if index != target_index]
    if vary_count and count > 1:
        count = int(rng.integers(1, count + 1))
    if count < 1:
        return []
    if not others:
        raise RetrievalError(
            f"Sample {target_index} has no other sample to take a {concept} reference from; "
            "add pictures of its character or leave it out of training."
        )
    chosen = rng.choice(len(others), count, replace=len(others) < count)
    return [others[i] for i in chosen]


def _fill(rng: np.random.Generator, options: TaskOptions) -> Colour:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return (red, green, blue) if options.random_fill else NEUTRAL


def _target(
    sample: Sample, rng: np.random.Generator, options: TaskOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    view, colour = options.target.view.draw(rng), options.target.colour.draw(rng)
    placement = place_region(find_figure_region(sample), options.size, view)
    pixels = recolour(sample.image, colour)
    image = place_picture(pixels, placement, _fill(rng, options))
    content = mask_box(placement.mirrored(placement.inside), options.size)
    head = sample.head_box
    face = mask_box((0, 0, 0, 0) if head is None else placement.box(head), options.size)
    return image, content, face


def _source(
    sample: Sample, concept: Concept, rng: np.random.Generator, options: TaskOptions
) -> Reference:
    return cut_reference(
        sample,
        concept,
        options.size,
        _fill(rng, options),
        remove_background=bool(rng.random() < options.remove_background),
        view=options.source.view.draw(rng),
        colour=options.source.colour.draw(rng),
    )
