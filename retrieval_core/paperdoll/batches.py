"""Training data of the paper-doll world: rendered characters, batches as a function of the step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..data import (
    Augmentation,
    RandomView,
    Sample,
    TaskOptions,
    draw_composition,
    draw_same_character,
)
from .draw import EYES, HAIR, LOWER, SKIN, UPPER, Rendering, render
from .judge import ATTRIBUTES, index_truth
from .text import LENGTH, PAD, Tokenizer
from .world import (
    SIZE,
    Figure,
    Scene,
    random_identity,
    random_outfit,
    random_scene,
)

# Of each character: pictures of it as it is, of its face in other clothes, and of its clothes on
# others. The last two only ever serve as references for composition.
SAME, OTHER_CLOTHES, OTHER_PEOPLE = 8, 3, 3
EACH = SAME + OTHER_CLOTHES + OTHER_PEOPLE
REFERENCES = 4
TARGETS = SAME - REFERENCES


def draw_character_figures(seed: int, index: int, held_out: bool) -> list[Figure]:
    """The `EACH` figures of character number `index`, from its own random stream."""
    rng = np.random.default_rng([seed, index, int(held_out)])
    identity, outfit = random_identity(rng, held_out), random_outfit(rng, held_out)
    pairs = [(identity, outfit)] * SAME
    pairs += [(identity, random_outfit(rng, held_out)) for _ in range(OTHER_CLOTHES)]
    pairs += [(random_identity(rng, held_out), outfit) for _ in range(OTHER_PEOPLE)]
    return [Figure(who, clothes, random_scene(rng)) for who, clothes in pairs]


@dataclass(frozen=True, eq=False)
class Characters:
    """Rendered characters.

    images: uint8 [N, EACH, 64, 64, 3]. masks: bool [N, EACH, 64, 64]. parts: uint8 [N, EACH, 64,
    64]. boxes: int [N, EACH, 4]. truths: int64 [N, EACH, A], see `judge.index_truth`. tags:
    [N][EACH] lists of tags. figures: of each character the first, for its identity and outfit.
    """

    images: np.ndarray
    masks: np.ndarray
    parts: np.ndarray
    boxes: np.ndarray
    truths: np.ndarray
    tags: list[list[list[str]]]
    figures: list[Figure]

    def samples(self, index: int) -> list[Sample]:
        columns = (self.images, self.masks, self.boxes, self.tags, self.parts)
        return [
            Sample(image, mask, tuple(box), tags, parts)
            for image, mask, box, tags, parts in zip(*(column[index] for column in columns))
        ]

    def in_scene(self, index: int, scene: Scene, rng: np.random.Generator) -> Rendering:
        """A character in a scene, placed and mirrored anew."""
        own = random_scene(rng)
        scene = replace(scene, mirror=own.mirror, shift=own.shift)
        return render(replace(self.figures[index], scene=scene))


def render_characters(seed: int, count: int, held_out: bool = False) -> Characters:
    """Renders `count` characters on all processors; the same for the same seed anywhere."""
    chunk = 50
    starts = range(0, count, chunk)
    jobs = [(seed, start, min(start + chunk, count), held_out) for start in starts]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(_render_range, jobs))
    *arrays, tags, firsts = zip(*parts)
    joined = (np.concatenate(array) for array in arrays)
    return Characters(*joined, sum(tags, []), sum(firsts, []))


def _render_range(job: tuple[int, int, int, bool]) -> tuple:
    """The fields of `Characters`, of some of them."""
    seed, start, end, held_out = job
    figures = [draw_character_figures(seed, index, held_out) for index in range(start, end)]
    drawn = [[render(figure) for figure in row] for row in figures]
    return (
        np.stack([[d.image for d in row] for row in drawn]),
        np.stack([[d.mask for d in row] for row in drawn]),
        np.stack([[d.parts for d in row] for row in drawn]),
        np.array([[d.head_box for d in row] for row in drawn]),
        np.array([[index_truth(figure) for figure in row] for row in figures]),
        [[figure.scene.tags() for figure in row] for row in figures],
        [row[0] for row in figures],
    )


def render_any(seed: int, count: int) -> list[Rendering]:
    """Renders `count` independent figures of the whole world, held-out characters included."""
    chunk = 250
    jobs = [(seed, start, min(start + chunk, count)) for start in range(0, count, chunk)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return [drawn for part in pool.map(_render_any, jobs) for drawn in part]


def _render_any(job: tuple[int, int, int]) -> list[Rendering]:
    seed, start, end = job
    drawn = []
    for index in range(start, end):
        rng = np.random.default_rng([seed, index, 2])
        who, clothes = random_identity(rng, None), random_outfit(rng, None)
        drawn.append(render(Figure(who, clothes, random_scene(rng))))
    return drawn


def to_images(pixels: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] to float32 [N, 3, H, W] in 0..1, leading dimensions flattened."""
    flat = torch.from_numpy(np.ascontiguousarray(pixels)).flatten(0, -4)
    return flat.movedim(-1, 1).float() / 255


def write_prompt(
    tags: Sequence[str], rng: np.random.Generator, tag_drop: float, text_drop: float
) -> str:
    """A prompt of tags, each left out with one probability and all of them with another."""
    kept = [tag for tag in tags if rng.random() >= tag_drop]
    return "" if rng.random() < text_drop else ", ".join(kept)


@dataclass(frozen=True)
class BaseBatches:
    """Pictures and tags for the base model; a batch depends on the seed and the step only.

    tag_drop: probability that a single tag is left out; text_drop: that all are. pairs: every
    other batch has half as many pictures, twice as wide, of two characters in one scene.
    """

    characters: Characters
    size: int
    seed: int
    tag_drop: float = 0.1
    text_drop: float = 0.1
    pairs: bool = False

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images [B, 3, 64, 64] or [B / 2, 3, 64, 128] in 0..1 and token ids, a row an image."""
        rng = np.random.default_rng([self.seed, step])
        if self.pairs and step % 2:
            return self._pairs(rng)
        count = len(self.characters.images)
        who, which = rng.integers(count, size=self.size), rng.integers(EACH, size=self.size)
        ids = [self._ids(self.characters.tags[i][j], rng) for i, j in zip(who, which)]
        return to_images(self.characters.images[who, which]), torch.tensor(ids)

    def _pairs(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        pictures, ids = [], []
        for _ in range(self.size // 2):
            scene = random_scene(rng)
            both = rng.choice(len(self.characters.figures), 2, replace=False).tolist()
            drawn = [self.characters.in_scene(i, scene, rng).image for i in both]
            pictures.append(np.concatenate(drawn, 1))
            ids.append(self._ids(scene.tags(), rng))
        return to_images(np.stack(pictures)), torch.tensor(ids)

    def _ids(self, tags: Sequence[str], rng: np.random.Generator) -> list[int]:
        return Tokenizer()(write_prompt(tags, rng, self.tag_drop, self.text_drop))


@dataclass(frozen=True)
class CriticBatches:
    """Pairs of pictures of one character in two scenes, and what references would give."""

    characters: Characters
    size: int
    seed: int

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, 3, 64, 64] in 0..1, others of the same characters, and truths [B, A]."""
        rng = np.random.default_rng([self.seed, step, 3])
        who = rng.integers(len(self.characters.images), size=self.size)
        one, other = rng.integers(SAME, size=(2, self.size))
        images, truths = self.characters.images, self.characters.truths[who, one]
        return (
            to_images(images[who, one]),
            to_images(images[who, other]),
            torch.from_numpy(truths[:, _READ_COLUMNS]),
        )


@dataclass(frozen=True, eq=False)
class RetrievalBatch:
    """G characters, each with `TARGETS` targets that share R = `REFERENCES` references.

    targets: [G * T, 3, S, S]; ids: [G * T, L]; face: [G * T, S, S]; references: [G * R, 3, S, S];
    reference_ids: [G * R, L]; masks: bool [G * R, S, S]; used: bool [G, R]; target_parts,
    reference_parts: uint8 [G * T, S, S] and [G * R, S, S], see `training.correspondence`; truths:
    [G * T, A] the attributes of `READ`. paired: rows of the groups 2g and 2g + 1 are in one scene
    and stand side by side (see `training.pairs`).
    """

    targets: Tensor
    ids: Tensor
    face: Tensor
    references: Tensor
    reference_ids: Tensor
    masks: Tensor
    used: Tensor
    target_parts: Tensor
    reference_parts: Tensor
    truths: Tensor
    paired: bool = False


# What a reference of a concept is to give; the clothes seen under a face are not asked for.
PARTS_OF = {
    "figure": (HAIR, SKIN, EYES, UPPER, LOWER),
    "face": (HAIR, SKIN, EYES),
    "clothes": (UPPER, LOWER),
}
# Attributes that come from references, and the part that shows each.
READ = {
    "hair style": HAIR,
    "hair colour": HAIR,
    "eye colour": EYES,
    "skin": SKIN,
    "upper": UPPER,
    "upper colour": UPPER,
    "upper pattern": UPPER,
    "lower": LOWER,
    "lower colour": LOWER,
}
READ_SIZES = {name: (part, len(ATTRIBUTES[name])) for name, part in READ.items()}
_READ_COLUMNS = [list(ATTRIBUTES).index(name) for name in READ]
SOURCE = Augmentation(RandomView(scale=(0.85, 1.25), shift=0.06, flip=0.5))


@dataclass(frozen=True)
class RetrievalBatches:
    """Both tasks of §3.3, half and half; a batch depends on the seed and the step only.

    References of a character are shared by its targets, so that encoding them pays off. Sources
    are augmented; targets are not, since the base model never saw a cropped figure.
    fewer: probability that only 1 to 3 of the references are used. pairs: every other batch shows
    its characters two by two.
    """

    characters: Characters
    size: int
    seed: int
    text_drop: float = 0.5
    tag_drop: float = 0.1
    fewer: float = 0.2
    options: TaskOptions = TaskOptions(text_drop=0.0, reference_drop=0.0, source=SOURCE)
    reference_drop: float = 0.05
    pairs: bool = False

    def batch(self, step: int) -> RetrievalBatch:
        """One batch of `size` characters."""
        rng = np.random.default_rng([self.seed, step, 1])
        tokenizer = Tokenizer()
        paired, scenes = self.pairs and step % 2 == 1, None
        groups = []
        for number, index in enumerate(self._characters(rng)):
            if paired and number % 2 == 0:
                scenes = [random_scene(rng) for _ in range(TARGETS)]
            groups.append(self._group(int(index), rng, tokenizer, scenes))
        columns = list(zip(*groups))
        targets, face, references, masks, target_parts, reference_parts = (
            np.concatenate(columns[i]) for i in (0, 2, 3, 5, 7, 8)
        )
        return RetrievalBatch(
            targets=to_images(targets),
            ids=torch.tensor(sum(columns[1], [])),
            face=torch.from_numpy(face),
            references=to_images(references),
            reference_ids=torch.tensor(sum(columns[4], [])),
            masks=torch.from_numpy(masks),
            used=torch.from_numpy(np.stack(columns[6])),
            target_parts=torch.from_numpy(target_parts),
            reference_parts=torch.from_numpy(reference_parts),
            truths=torch.from_numpy(np.concatenate(columns[9])),
            paired=paired,
        )

    def _characters(self, rng: np.random.Generator) -> np.ndarray:
        return rng.choice(len(self.characters.images), self.size, replace=False)

    def _group(
        self,
        index: int,
        rng: np.random.Generator,
        tokenizer: Tokenizer,
        scenes: Sequence[Scene] | None,
    ) -> tuple:
        samples = self.characters.samples(index)
        order = rng.permutation(SAME).tolist()
        targets, sources = order[:TARGETS], order[TARGETS:]
        faces = [*sources, *range(SAME, SAME + OTHER_CLOTHES)]
        bodies = [*sources, *range(SAME + OTHER_CLOTHES, EACH)]
        if rng.random() < 0.5:
            item = draw_same_character(samples, targets[0], rng, self.options, indices=sources)
        else:
            item = draw_composition(
                samples, targets[0], rng, self.options, face_indices=faces, body_indices=bodies
            )
        shown = [samples[target] for target in targets]
        if scenes is not None:
            drawn = [self.characters.in_scene(index, scene, rng) for scene in scenes]
            shown = [
                Sample(d.image, d.mask, d.head_box, d.figure.scene.tags(), d.parts) for d in drawn
            ]
        head = np.zeros((TARGETS, SIZE, SIZE), bool)
        ids = []
        for row, sample in enumerate(shown):
            x0, y0, x1, y1 = sample.head_box or (0, 0, 0, 0)
            head[row, y0:y1, x0:x1] = True
            prompt = write_prompt(sample.tags, rng, self.tag_drop, self.text_drop)
            ids.append(tokenizer(prompt))
        everything = np.ones((SIZE, SIZE), bool)
        return (
            np.stack([sample.image for sample in shown]),
            ids,
            head,
            np.stack([r.image for r in item.references]),
            [tokenizer(r.concept) for r in item.references],
            np.stack([everything if r.mask is None else r.mask for r in item.references]),
            self._used(rng),
            np.stack([sample.parts for sample in shown]),
            np.stack(
                [
                    np.where(np.isin(r.parts, PARTS_OF[r.concept]), r.parts, 0)
                    for r in item.references
                ]
            ),
            self.characters.truths[index][targets][:, _READ_COLUMNS],
        )

    def _used(self, rng: np.random.Generator) -> np.ndarray:
        """Which references count: all, with some probability fewer, rarely none."""
        used = np.ones(REFERENCES, bool)
        if rng.random() < self.fewer:
            used[rng.permutation(REFERENCES)[: rng.integers(1, REFERENCES)]] = False
        if rng.random() < self.reference_drop:
            used[:] = False
        return used


__all__ = [
    "LENGTH",
    "PAD",
    "BaseBatches",
    "Characters",
    "CriticBatches",
    "RetrievalBatch",
    "RetrievalBatches",
    "draw_character_figures",
    "render_any",
    "render_characters",
    "to_images",
]
