"""The two tasks of §3.3: how a target's references are drawn and both are varied (§4.3, §5.1).

Samples are opened only where an item shows them, once each: which may be drawn is known beforehand,
from the index of a data set or from the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RetrievalError
from .augment import RandomView
from .concepts import cut_reference, find_figure_region
from .data_set import DataSet, Task
from .placing import mask_box, place_picture, place_region
from .sample import Colour, Concept, Reference, Sample

Indices = Sequence[int] | np.ndarray
# For each concept: how many references, and the indices of the samples that may be drawn.
Wanted = list[tuple[Concept, int, Indices]]


@dataclass(frozen=True)
class TaskOptions:
    """Options of both tasks; RetrievalError for values out of range.

    size: side of targets and references in pixels.
    text_drop: probability of no tags (§5.4's default). reference_drop: of no references.
    remove_background: of filling a reference's background (the paper's number is lost in the text
    at hand).
    target, source: augmentation of targets and of references, drawn independently.
    """

    size: int = 64
    text_drop: float = 0.5
    reference_drop: float = 0.05
    remove_background: float = 0.5
    target: RandomView = RandomView()
    source: RandomView = RandomView()

    def __post_init__(self) -> None:
        if self.size < 1:
            raise RetrievalError(f"The image size is {self.size}; it must be 1 pixel or more.")
        for name in ("text_drop", "reference_drop", "remove_background"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise RetrievalError(f"The {name} probability is {value}; give 0 to 1.")


@dataclass(frozen=True, eq=False)
class TrainingItem:
    """A target and its references.

    target: uint8 [S, S, 3]. content: bool [S, S], False in the padding. face: bool [S, S], True
    in the head box (all False without one), within `content`.
    tags: empty if the text was dropped. references: empty if they were dropped.
    """

    target: np.ndarray
    content: np.ndarray
    face: np.ndarray
    tags: list[str]
    references: list[Reference]


def draw_item(
    data_set: DataSet,
    target_index: int,
    task: Task,
    rng: np.random.Generator,
    options: TaskOptions | None = None,
) -> TrainingItem:
    """An item of a data set, with the numbers of references that the tasks have by default.

    References share the target's character, artist and outfit; faces may wear another outfit.
    Raises RetrievalError if there is none (see `DataSet.find_targets`).
    """
    pools = find_pools(data_set, target_index, task)
    if task == "same character":
        return draw_same_character(data_set, target_index, rng, options, indices=pools["figure"])
    return draw_composition(
        data_set,
        target_index,
        rng,
        options,
        face_indices=pools["face"],
        body_indices=pools["clothes"],
    )


def find_pools(data_set: DataSet, target_index: int, task: Task) -> dict[Concept, np.ndarray]:
    """Concept -> the rows that a target's references are drawn from; the target may be among them.

    Figures and clothes: of the target's character, artist and outfit. Faces: in any outfit.
    """
    alike = data_set.outfits.find_members(target_index)
    if task == "same character":
        return {"figure": alike}
    faces = data_set.identities.find_members(target_index)
    has_head_box = data_set.has_head_box
    return {"face": faces[has_head_box[faces]], "clothes": alike[has_head_box[alike]]}


def draw_same_character(
    samples: Sequence[Sample] | DataSet,
    target_index: int,
    rng: np.random.Generator,
    options: TaskOptions | None = None,
    *,
    count: int = 4,
    indices: Indices | None = None,
) -> TrainingItem:
    """Same-character task: `count` whole figures of the target's character.

    indices: samples that may be references, all by default. The target never is; with fewer than
    `count` others, some are drawn more than once.
    Raises RetrievalError if no other sample is left.
    """
    pool = range(len(samples)) if indices is None else indices
    return _draw_item(
        samples, target_index, rng, options or TaskOptions(), [("figure", count, pool)]
    )


def draw_composition(
    samples: Sequence[Sample] | DataSet,
    target_index: int,
    rng: np.random.Generator,
    options: TaskOptions | None = None,
    *,
    faces: int = 2,
    bodies: int = 2,
    face_indices: Indices | None = None,
    body_indices: Indices | None = None,
) -> TrainingItem:
    """Concept composition: `faces` faces and `bodies` bodies, drawn separately (§3.3).

    face_indices, body_indices: samples with the target's face and with its clothes, all by
    default; each must have a head box. Otherwise like `draw_same_character`.
    """
    face_pool, body_pool = (
        range(len(samples)) if pool is None else pool for pool in (face_indices, body_indices)
    )
    wanted: Wanted = [("face", faces, face_pool), ("clothes", bodies, body_pool)]
    return _draw_item(samples, target_index, rng, options or TaskOptions(), wanted)


def _draw_item(
    samples: Sequence[Sample] | DataSet,
    target_index: int,
    rng: np.random.Generator,
    options: TaskOptions,
    wanted: Wanted,
) -> TrainingItem:
    if not 0 <= target_index < len(samples):
        raise RetrievalError(
            f"The target's index is {target_index}, and there are {len(samples)} samples."
        )
    target = samples[target_index]
    tags = [] if rng.random() < options.text_drop else list(target.tags)
    image, content, face = _place_target(target, rng, options)
    references: list[Reference] = []
    if rng.random() < options.reference_drop:
        return TrainingItem(image, content, face, tags, references)
    opened: dict[int, Sample] = {}
    for concept, count, pool in wanted:
        for index in draw_indices(target_index, pool, count, concept, rng):
            if index not in opened:
                opened[index] = samples[index]
            references.append(_cut_source(opened[index], concept, rng, options))
    return TrainingItem(image, content, face, tags, references)


def draw_indices(
    target_index: int, pool: Indices, count: int, concept: Concept, rng: np.random.Generator
) -> list[int]:
    """Indices of `count` references, never the target's, all different if there are enough.

    Raises RetrievalError if the pool has no other than the target.
    """
    if count < 1:
        return []
    others = [int(index) for index in pool if index != target_index]
    if not others:
        raise RetrievalError(
            f"Sample {target_index} has no other sample to take a {concept} reference from; "
            "add pictures of its character or leave it out of training."
        )
    chosen = rng.choice(len(others), count, replace=len(others) < count)
    return [others[i] for i in chosen]


def _draw_fill(rng: np.random.Generator) -> Colour:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


def _place_target(
    sample: Sample, rng: np.random.Generator, options: TaskOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Target, content and face as in `TrainingItem`."""
    view = options.target.draw(rng)
    placement = place_region(find_figure_region(sample), options.size, view)
    image = place_picture(sample.image, placement, _draw_fill(rng))
    content = mask_box(placement.mirror(placement.inside), options.size)
    head = sample.head_box
    face = mask_box((0, 0, 0, 0) if head is None else placement.place_box(head), options.size)
    return image, content, face


def _cut_source(
    sample: Sample, concept: Concept, rng: np.random.Generator, options: TaskOptions
) -> Reference:
    return cut_reference(
        sample,
        concept,
        options.size,
        _draw_fill(rng),
        remove_background=bool(rng.random() < options.remove_background),
        view=options.source.draw(rng),
    )
