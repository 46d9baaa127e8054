"""Batches of the two tasks (§3.3) from cached latents and prompt embeddings.

An item is a target and its references, or several targets that share them, which makes encoding the
references cheaper for each target.

Which items a step trains on is a function of the seed and the step alone: any number of processes,
and a resumed run, get the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..data.data_set import Task
from ..data.sample import Concept
from ..data.tasks import draw_indices, find_pools
from .correspondence import UNKNOWN
from .latent_cache import CONCEPTS, TARGET, LatentCache
from .run_config import RunConfig


@dataclass(frozen=True, eq=False)
class Batch:
    """G items of T targets and R references; floating-point tensors are float16 as cached.

    Attributes:
        latents: [B, 4, h, w] clean latents of the B = G * T targets, T consecutive ones an item.
        content, face: [B, 1, h, w], share of each latent pixel in the picture (not in its padding)
            and in the face box, 0 to 1; `face` is 0 without a head box.
        context, y: [B, L, D] and [B, A] of the prompts, the empty prompt's where text is dropped.
        reference_latents: [G, R, 4, h, w], 0 where references are dropped.
        reference_context, reference_y: [G, R, L, D] and [G, R, A] of the references' concepts.
        reference_masks: bool [G, R, h, w], True on what is to be retrieved.
        used: bool [G, R], False where references are dropped.
        parts, reference_parts: uint8 [B, 2 h, 2 w] and [G, R, 2 h, 2 w], part labels; `UNKNOWN` for
            targets that lack them or whose references do. None where they are not cached.
        numbers: int64 [B], the number of each target in the run, the same for any number of
            processes; for seeding its noise.
        names: of each item, the pictures of its targets and of its references.
        y and reference_y are None where the base has no vector conditioning.
    """

    latents: Tensor
    content: Tensor
    face: Tensor
    context: Tensor
    y: Tensor | None
    reference_latents: Tensor
    reference_context: Tensor
    reference_y: Tensor | None
    reference_masks: Tensor
    used: Tensor
    parts: Tensor | None
    reference_parts: Tensor | None
    numbers: Tensor
    names: list[list[str]]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """The batch on a device, its floating-point tensors as `dtype`."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{k: move(v) if isinstance(v, Tensor) else v for k, v in values.items()})

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the data loader."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        pinned = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in values.items()}
        return Batch(**pinned)


class TaskItems(Dataset[dict[str, Any]]):
    """The items of a run by their number, drawn from the cache (§3.3).

    Every `len(targets)` items are an epoch: each target once, in an order of its own. Item `n` is a
    function of the seed and of n. Further targets that share its references are drawn from the rest
    of its outfit, some twice if there are too few. Of the task "both", a target whose references
    lack head boxes is drawn for the same character only, so that the share of compositions is
    `composition_share` of the others.
    """

    def __init__(self, cache: LatentCache, config: RunConfig) -> None:
        self.cache, self.config = cache, config
        self.targets = np.flatnonzero(cache.wanted[TARGET])
        self.composes = np.zeros(len(cache.data_set), np.bool_)
        if "composition" in cache.tasks:
            self.composes[cache.data_set.find_targets("composition")] = True
        self._epoch, self._order = -1, self.targets  # order of the epoch read last

    def __len__(self) -> int:
        """Number of items in an epoch."""
        return len(self.targets)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The fields of `Batch` for one item, as lists of its targets and of its references."""
        cache, config = self.cache, self.config
        row = self.find_target(number)
        rng = np.random.default_rng([config.seed, number, 1])
        without_text, without_references, choice = rng.random(3).tolist()
        views, drops = [int(rng.integers(cache.views))], [without_text]
        composes = self.composes[row] and (
            config.task == "composition" or choice < config.composition_share
        )
        chosen = self._choose_references(row, "composition" if composes else "same character", rng)
        used = without_references >= config.reference_drop
        latents, masks, reference_parts = [], [], []
        for reference, concept in chosen:
            view, removed = int(rng.integers(cache.views)), rng.random() < config.remove_background
            read, mask, labels = cache.read_reference(reference, concept, bool(removed), view)
            latents.append(read if used else torch.zeros_like(read))
            masks.append(mask)
            reference_parts.append(labels)
        rows = [row, *self._choose_others(row, [reference for reference, _ in chosen], rng)]
        for _ in rows[1:]:
            views.append(int(rng.integers(cache.views)))
            drops.append(float(rng.random()))
        targets, content, face, parts = zip(
            *(cache.read_target(one, view) for one, view in zip(rows, views))
        )
        if cache.has_parts and any(bool((labels == UNKNOWN).any()) for labels in reference_parts):
            parts = [torch.full_like(labels, UNKNOWN) for labels in parts]
        texts = [
            cache.read_prompt(0 if drop < config.text_drop else int(cache.prompts[one]))
            for one, drop in zip(rows, drops)
        ]
        prompts = [cache.read_prompt(1 + CONCEPTS.index(concept)) for _, concept in chosen]
        has_y, images = texts[0][1] is not None, cache.data_set.index["image"]
        first = number * config.targets
        return {
            "latents": targets,
            "content": [mask.half() / 255 for mask in content],
            "face": [mask.half() / 255 for mask in face],
            "context": [context for context, _ in texts],
            "y": [y for _, y in texts] if has_y else None,
            "reference_latents": latents,
            "reference_context": [context for context, _ in prompts],
            "reference_y": [y for _, y in prompts] if has_y else None,
            "reference_masks": masks,
            "used": torch.full((len(chosen),), used),
            "parts": parts if cache.has_parts else None,
            "reference_parts": reference_parts if cache.has_parts else None,
            "numbers": list(torch.arange(first, first + config.targets)),
            "names": [images[i].as_py() for i in (*rows, *(reference for reference, _ in chosen))],
        }

    def _choose_others(
        self, row: int, references: list[int], rng: np.random.Generator
    ) -> list[int]:
        """The targets beside `row` that share its references."""
        if self.config.targets == 1:
            return []
        alike = self.cache.data_set.outfits.find_members(row)
        others = np.setdiff1d(alike, [row, *references])
        if not len(others):
            others = np.array([row])
        count = self.config.targets - 1
        return rng.choice(others, count, replace=len(others) < count).tolist()

    def find_target(self, number: int) -> int:
        """The picture that is an item's first target."""
        epoch, position = divmod(number, len(self.targets))
        if epoch != self._epoch:
            rng = np.random.default_rng([self.config.seed, epoch, 0])
            self._epoch, self._order = epoch, rng.permutation(self.targets)
        return int(self._order[position])

    def _choose_references(
        self, row: int, task: Task, rng: np.random.Generator
    ) -> list[tuple[int, Concept]]:
        """Pictures and concepts of a target's references; of a composition half are faces."""
        pools, count = find_pools(self.cache.data_set, row, task), self.config.references
        counts = {"figure": count, "face": count - count // 2, "clothes": count // 2}
        return [
            (index, concept)
            for concept, pool in pools.items()
            for index in draw_indices(row, pool, counts[concept], concept, rng)
        ]


def collate_items(items: list[dict[str, Any]]) -> Batch:
    """The batch of items; each tensor is copied once, in a worker process to shared memory."""
    values: dict[str, Any] = {}
    for name, first in items[0].items():
        column = [item[name] for item in items]
        if first is None or name == "names":
            values[name] = None if first is None else column
        elif isinstance(first, (list, tuple)):
            values[name] = default_collate([row for rows in column for row in rows])
            if name.startswith("reference_"):
                values[name] = values[name].unflatten(0, (len(items), len(first)))
        else:
            values[name] = default_collate(column)
    return Batch(**values)


def make_sampler(config: RunConfig, rank: int, world: int, start: int = 0) -> list[range]:
    """Numbers of the items of each forward pass of process `rank` of `world`.

    start: the first optimiser step. Passes are dealt out to the processes in turn, so that two
    processes have in one pass what one process has in two.
    """
    size = config.batch_size
    passes = range(start * config.accumulate, config.steps * config.accumulate)
    firsts = ((number * world + rank) * size for number in passes)
    return [range(first, first + size) for first in firsts]


def make_loader(
    cache: LatentCache, config: RunConfig, rank: int = 0, world: int = 1, start: int = 0
) -> DataLoader[Batch]:
    """Reads the batches of a process in `config.workers` worker processes, in page-locked memory
    where there is a GPU."""
    return DataLoader(
        TaskItems(cache, config),
        batch_sampler=make_sampler(config, rank, world, start),
        collate_fn=collate_items,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
    )
