"""Training data of the paper-doll world: rendered characters, batches as a function of the step."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..data import RandomView, Sample, TaskOptions, draw_composition, draw_same_character
from .draw import EYES, HAIR, LOWER, SKIN, UPPER, Rendering, render
from .judge import ATTRIBUTES, index_truth
from .text import Tokenizer
from .world import SIZE, Figure, Scene, random_identity, random_outfit, random_scene

# Renderings of one character as it is, of its face in other clothes, and of its clothes on other
# people. The last two serve only as references for composition.
SAME, OTHER_CLOTHES, OTHER_PEOPLE = 8, 3, 3
EACH = SAME + OTHER_CLOTHES + OTHER_PEOPLE
REFERENCES = 4
TARGETS = SAME - REFERENCES
# Probabilities that only 1 to 3 of the references are used, and that none is.
FEWER_REFERENCES, NO_REFERENCES = 0.2, 0.05
# Probabilities that a prompt leaves a tag out, and that one of the base model is empty.
TAG_DROP, BASE_TEXT_DROP = 0.1, 0.1

# Sources are augmented; targets are not, since the base model never saw a cropped figure.
SOURCE = RandomView(scale=(0.85, 1.25), shift=0.06, flip=0.5)
TASK_OPTIONS = TaskOptions(text_drop=0.0, reference_drop=0.0, source=SOURCE)

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

Characters = Sequence[Sequence[Rendering]]  # [N][EACH]
T = TypeVar("T")


def render_characters(seed: int, count: int) -> Characters:
    """Renders `count` characters that are not held out, on all processors; the same for the same
    seed anywhere."""
    return _map_in_processes(partial(render_character, seed), count, 50)


def render_character(seed: int, index: int) -> list[Rendering]:
    """The `EACH` figures of character number `index`, from a random stream per character."""
    rng = np.random.default_rng([seed, index, 0])
    identity, outfit = random_identity(rng, False), random_outfit(rng, False)
    pairs = [(identity, outfit)] * SAME
    pairs += [(identity, random_outfit(rng, False)) for _ in range(OTHER_CLOTHES)]
    pairs += [(random_identity(rng, False), outfit) for _ in range(OTHER_PEOPLE)]
    return [render(Figure(who, clothes, random_scene(rng))) for who, clothes in pairs]


def render_any(seed: int, count: int) -> list[Rendering]:
    """Renders `count` independent figures of the whole world, held-out characters included."""
    return _map_in_processes(partial(_render_any, seed), count, 250)


def _map_in_processes(function: Callable[[int], T], count: int, chunk: int) -> list[T]:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, range(count), chunksize=chunk))


def _render_any(seed: int, index: int) -> Rendering:
    rng = np.random.default_rng([seed, index, 2])
    who, clothes = random_identity(rng), random_outfit(rng)
    return render(Figure(who, clothes, random_scene(rng)))


def render_in_scene(figure: Figure, scene: Scene, rng: np.random.Generator) -> Rendering:
    """Renders a figure in `scene`, with a random shift and mirroring."""
    moved = random_scene(rng)
    return render(replace(figure, scene=replace(scene, mirror=moved.mirror, shift=moved.shift)))


def to_images(pixels: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] to float32 [N, 3, H, W] in 0..1, leading dimensions flattened."""
    return scale_pixels(torch.from_numpy(np.ascontiguousarray(pixels)).flatten(0, -4))


def scale_pixels(pixels: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in 0..1."""
    return pixels.movedim(-1, 1).float() / 255


def stack_images(renderings: Sequence[Rendering]) -> Tensor:
    """float32 [N, 3, 64, 64] in 0..1."""
    return to_images(np.stack([rendering.image for rendering in renderings]))


def index_read_attributes(renderings: Sequence[Rendering]) -> Tensor:
    """int64 [N, len(READ)]: the true value's index of each attribute in `READ`."""
    columns = [list(ATTRIBUTES).index(name) for name in READ]
    return torch.tensor([index_truth(r.figure) for r in renderings])[:, columns]


def write_prompt(scene: Scene, rng: np.random.Generator, text_drop: float) -> str:
    """A prompt of the scene's tags, some left out, and empty with probability `text_drop`."""
    named = [tag for tag in scene.tags() if rng.random() >= TAG_DROP]
    return "" if rng.random() < text_drop else ", ".join(named)


def tokenize(prompts: Sequence[str]) -> Tensor:
    """Token ids [N, L] of prompts."""
    tokenizer = Tokenizer()
    return torch.tensor([tokenizer(prompt) for prompt in prompts])


class BaseBatches:
    """Pictures and tags for the base model; a batch depends on the seed and the step only.

    pairs: every other batch has half as many pictures, twice as wide, of two characters in one
    scene. device: holds all pictures in its memory, and is given the batches.
    """

    def __init__(
        self,
        characters: Characters,
        size: int,
        seed: int,
        pairs: bool = False,
        device: str = "cpu",
    ) -> None:
        self.characters, self.size, self.seed = characters, size, seed
        self.pairs, self.device = pairs, device
        images = np.stack([drawn.image for each in characters for drawn in each])
        self.images = torch.from_numpy(images).to(device)  # of character i from EACH * i on

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images [B, 3, 64, 64] or [B / 2, 3, 64, 128] in 0..1 and token ids, a row an image."""
        rng = np.random.default_rng([self.seed, step])
        if self.pairs and step % 2:
            return self._pairs(rng)
        count = len(self.characters)
        who, which = rng.integers(count, size=self.size), rng.integers(EACH, size=self.size)
        scenes = [self.characters[i][j].figure.scene for i, j in zip(who, which)]
        prompts = [write_prompt(scene, rng, BASE_TEXT_DROP) for scene in scenes]
        chosen = torch.from_numpy(EACH * who + which).to(self.device)
        return scale_pixels(self.images[chosen]), tokenize(prompts).to(self.device)

    def _pairs(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        pictures, prompts = [], []
        for _ in range(self.size // 2):
            scene = random_scene(rng)
            both = rng.choice(len(self.characters), 2, replace=False).tolist()
            figures = [self.characters[i][0].figure for i in both]
            pictures.append(
                np.concatenate([render_in_scene(f, scene, rng).image for f in figures], 1)
            )
            prompts.append(write_prompt(scene, rng, BASE_TEXT_DROP))
        images, ids = to_images(np.stack(pictures)), tokenize(prompts)
        return images.to(self.device), ids.to(self.device)


@dataclass(frozen=True)
class CriticBatches:
    """Pairs of pictures of one character in two scenes, and the attributes that both show."""

    characters: Characters
    size: int
    seed: int

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, 3, 64, 64] in 0..1, others of the same characters, and truths [B, A]."""
        rng = np.random.default_rng([self.seed, step, 3])
        who = rng.integers(len(self.characters), size=self.size)
        one, other = (
            [self.characters[i][j] for i, j in zip(who, which)]
            for which in rng.integers(SAME, size=(2, self.size))
        )
        return stack_images(one), stack_images(other), index_read_attributes(one)


@dataclass(frozen=True, eq=False)
class RetrievalBatch:
    """G characters, each with `TARGETS` targets that share R = `REFERENCES` references.

    targets: [G * T, 3, S, S]; ids: [G * T, L]; face: [G * T, S, S]; references: [G * R, 3, S, S];
    reference_ids: [G * R, L]; masks: bool [G * R, S, S]; used: bool [G, R]; target_parts,
    reference_parts: uint8 [G * T, S, S] and [G * R, S, S], see `training.correspondence`; truths:
    [G * T, A] the attributes of `READ`. paired: rows of the groups 2g and 2g + 1 share a scene, as
    the left and right half of one picture (see `pairs`).
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


@dataclass(frozen=True)
class RetrievalBatches:
    """Both tasks of §3.3, half and half; a batch depends on the seed and the step only.

    References of a character are shared by its targets, so that encoding them pays off.
    pairs: every other batch shows its characters two by two.
    """

    characters: Characters
    size: int
    seed: int
    text_drop: float
    pairs: bool = False

    def batch(self, step: int) -> RetrievalBatch:
        """One batch of `size` characters."""
        rng = np.random.default_rng([self.seed, step, 1])
        paired, scenes, groups = self.pairs and step % 2 == 1, None, []
        chosen = rng.choice(len(self.characters), self.size, replace=False).tolist()
        for number, index in enumerate(chosen):
            if paired and number % 2 == 0:
                scenes = [random_scene(rng) for _ in range(TARGETS)]
            groups.append(self._draw_group(self.characters[index], rng, scenes))
        joined = {name: torch.cat([group[name] for group in groups]) for name in groups[0]}
        return RetrievalBatch(**joined, paired=paired)

    def _draw_group(
        self, own: Sequence[Rendering], rng: np.random.Generator, scenes: Sequence[Scene] | None
    ) -> dict[str, Tensor]:
        """The tensors of one character by `RetrievalBatch`'s names; scenes: of its targets."""
        samples = [Sample(r.image, r.mask, r.head_box, r.figure.scene.tags(), r.parts) for r in own]
        order = rng.permutation(SAME).tolist()
        targets, sources = order[:TARGETS], order[TARGETS:]
        faces = [*sources, *range(SAME, SAME + OTHER_CLOTHES)]
        bodies = [*sources, *range(SAME + OTHER_CLOTHES, EACH)]
        if rng.random() < 0.5:
            item = draw_same_character(samples, targets[0], rng, TASK_OPTIONS, indices=sources)
        else:
            item = draw_composition(
                samples, targets[0], rng, TASK_OPTIONS, face_indices=faces, body_indices=bodies
            )
        shown = [own[target] for target in targets]
        if scenes is not None:
            shown = [render_in_scene(own[0].figure, scene, rng) for scene in scenes]
        face = torch.zeros(TARGETS, SIZE, SIZE, dtype=torch.bool)
        for row, rendering in zip(face, shown):
            x0, y0, x1, y1 = rendering.head_box
            row[y0:y1, x0:x1] = True
        prompts = [write_prompt(r.figure.scene, rng, self.text_drop) for r in shown]
        references = item.references
        unmasked = np.ones((SIZE, SIZE), bool)
        masks = [unmasked if r.mask is None else r.mask for r in references]
        parts = [np.where(np.isin(r.parts, PARTS_OF[r.concept]), r.parts, 0) for r in references]
        return {
            "targets": stack_images(shown),
            "ids": tokenize(prompts),
            "face": face,
            "references": to_images(np.stack([r.image for r in references])),
            "reference_ids": tokenize([r.concept for r in references]),
            "masks": torch.from_numpy(np.stack(masks)),
            "used": draw_used(rng)[None],
            "target_parts": torch.from_numpy(np.stack([r.parts for r in shown])),
            "reference_parts": torch.from_numpy(np.stack(parts)),
            "truths": index_read_attributes(shown),
        }


def draw_used(rng: np.random.Generator) -> Tensor:
    """bool [R], the references that count: all, with some probability fewer, rarely none."""
    used = torch.ones(REFERENCES, dtype=torch.bool)
    if rng.random() < FEWER_REFERENCES:
        used[rng.permutation(REFERENCES)[: rng.integers(1, REFERENCES)]] = False
    if rng.random() < NO_REFERENCES:
        used[:] = False
    return used
