"""Latents and prompt embeddings of a data set, computed once and stored as safetensors shards.

A picture has `views` random views as a target and of each concept as a reference; each is a
function of (seed, picture, concept, view). A shard is written atomically, so that a build that was
killed goes on with the shards that are missing. Readers map the shards into memory.

The folder's name has a digest of the data set, the base and the settings: it can be deleted at any
time, and is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.augment import UNCHANGED, RandomView
from ..data.concepts import cut_reference, find_figure_region
from ..data.data_set import INDEX, DataSet, Task
from ..data.placing import mask_box, place_parts, place_picture, place_region
from ..data.sample import Colour, Concept
from ..data.stages import digest_json
from ..errors import RetrievalError
from ..files import read_safetensors, save_safetensors, write_text
from .base_checkpoint import Base
from .correspondence import UNKNOWN
from .objective import resize_mask
from .run_config import RunConfig

GIB = 2**30
VERSION = 2  # to be raised whenever the content of a shard changes
PICTURES, PROMPTS = 16, 256  # in a shard
CONCEPTS: tuple[Concept, ...] = get_args(Concept)
TARGET = "target"
LABELS = 2  # part labels for each latent pixel along an edge
# View 0 is the whole picture as it is, the others are drawn.
TARGET_VIEW = RandomView(scale=(0.85, 1.1), shift=0.05, flip=0.5)
REFERENCE_VIEW = RandomView(scale=(0.75, 1.25), shift=0.1, flip=0.5)

# The shards that this process has mapped, by folder, kind and number; they stay until it ends.
_OPEN: dict[tuple[Path, str, int], dict[str, Tensor]] = {}

_ENCODED_PIXELS = 8 * 512 * 512  # in one pass of the VAE
_ENCODED_PROMPTS = 32  # in one pass of the text encoder


@dataclass(frozen=True)
class Views:
    """Views of one picture, uint8 [N, S, S, 3] and bool [N, S, S].

    content, face: of the targets, see `TrainingItem`. masks: of the references. parts,
    reference_parts: uint8 [N, S, S] part labels of both.
    """

    targets: np.ndarray
    content: np.ndarray
    face: np.ndarray
    references: np.ndarray
    masks: np.ndarray
    parts: np.ndarray
    reference_parts: np.ndarray


@dataclass(frozen=True, eq=False)
class LatentCache:
    """What the cache of a data set holds, and where each entry lies.

    Attributes:
        folder: of this cache.
        tasks: the tasks that it serves.
        size: edge of targets and references in pixels. views: of each picture and concept.
        backgrounds: whether references of pictures with a mask are stored with their background
            (False), without (True), or both.
        wanted: "target" or a concept -> bool [N], the pictures stored as such.
        shards: int64 [N], the shard of each picture, -1 for pictures that are not stored.
        first_target, first_reference: int64 [N], the first entry of each picture in its shard.
        texts: all prompts, the empty one and the concepts first.
        prompts: int64 [N], the prompt of each target.
        has_parts: whether part labels are stored.
    """

    data_set: DataSet
    folder: Path
    tasks: tuple[Task, ...]
    size: int
    views: int
    seed: int
    backgrounds: tuple[bool, ...]
    wanted: dict[str, np.ndarray]
    shards: np.ndarray
    first_target: np.ndarray
    first_reference: np.ndarray
    has_mask: np.ndarray
    prompts: np.ndarray
    has_parts: bool
    texts: list[str] = field(repr=False)

    def find_missing(self) -> tuple[list[int], list[int]]:
        """Numbers of the picture shards and of the prompt shards that are not stored yet."""
        pictures = range(int(self.shards.max(initial=-1)) + 1)
        prompts = range(-(-len(self.texts) // PROMPTS))
        return (
            [i for i in pictures if not self.name_shard("pictures", i).is_file()],
            [i for i in prompts if not self.name_shard("prompts", i).is_file()],
        )

    def name_shard(self, kind: str, number: int) -> Path:
        """The path of a shard of "pictures" or "prompts"."""
        return self.folder / f"{kind}-{number:06d}.safetensors"

    def open_shard(self, kind: str, number: int) -> dict[str, Tensor]:
        """The tensors of a shard, mapped."""
        key = (self.folder, kind, int(number))
        if key not in _OPEN:
            _OPEN[key] = read_safetensors(self.name_shard(kind, number))[0]
        return _OPEN[key]

    def list_backgrounds(self, row: int) -> tuple[bool, ...]:
        """For each block of a concept's views, whether the background is removed."""
        return self.backgrounds if self.has_mask[row] else (False,)

    def read_target(self, row: int, view: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Latent float16 [4, h, w]; content and face uint8 [1, h, w], shares of 255; part labels.

        The labels are uint8 [2 h, 2 w], `UNKNOWN` where the picture has none.
        """
        shard = self.open_shard("pictures", self.shards[row])
        entry = self.first_target[row] + view
        parts = shard["parts"][entry] if self.has_parts else None
        return shard["targets"][entry], shard["content"][entry], shard["face"][entry], parts

    def read_reference(
        self, row: int, concept: Concept, removed: bool, view: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Latent float16 [4, h, w], mask bool [h, w] and part labels as of `read_target`.

        removed: without its background. Ignored where only the other is stored.
        """
        backgrounds = self.list_backgrounds(row)
        block = backgrounds.index(removed) if removed in backgrounds else 0
        for earlier in CONCEPTS[: CONCEPTS.index(concept)]:
            block += self.wanted[earlier][row] * len(backgrounds)
        shard = self.open_shard("pictures", self.shards[row])
        entry = self.first_reference[row] + block * self.views + view
        parts = shard["reference_parts"][entry] if self.has_parts else None
        return shard["references"][entry], shard["masks"][entry], parts

    def read_prompt(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Context float16 [L, D] and vector conditioning [A] of a prompt by its number."""
        shard = self.open_shard("prompts", number // PROMPTS)
        entry = number % PROMPTS
        return shard["context"][entry], shard["y"][entry] if "y" in shard else None


def list_tasks(config: RunConfig) -> tuple[Task, ...]:
    """The tasks of a run."""
    return get_args(Task) if config.task == "both" else (config.task,)


def plan_cache(data_set: DataSet, base: Base, config: RunConfig) -> LatentCache:
    """Decides what is cached for a run, and where; reads no picture and writes nothing.

    Raises RetrievalError if no picture can be a target, or part labels are needed and there are
    none.
    """
    tasks = list_tasks(config)
    wanted = _choose_pictures(data_set, tasks)
    if not wanted[TARGET].any():
        with_head = " with a head box" if config.task == "composition" else ""
        raise RetrievalError(
            f"None of the {len(data_set)} pictures of the data set '{data_set.folder}' has another "
            f"one of its character, artist and outfit{with_head} to take references from, for the "
            f"task '{config.task}'; build it from sources that name the characters, with more "
            "pictures of each."
        )
    backgrounds = tuple(
        removed
        for removed, share in (
            (False, 1 - config.remove_background),
            (True, config.remove_background),
        )
        if share > 0
    )
    has_mask = data_set.index["mask"].is_valid().to_numpy()
    stored = np.logical_or.reduce(list(wanted.values()))
    shards = np.where(stored, (np.cumsum(stored) - 1) // PICTURES, -1)
    blocks = sum(wanted[concept].astype(np.int64) for concept in CONCEPTS)
    blocks = blocks * np.where(has_mask, len(backgrounds), 1)
    texts, prompts = _list_prompts(data_set, wanted[TARGET])
    by_parts = [name for name in ("part_weight", "correspondence") if getattr(config, name)]
    if by_parts and data_set.index["parts"].null_count == len(data_set):
        raise RetrievalError(
            f"The setting {by_parts[0]} needs part labels, and none of the {len(data_set)} "
            f"pictures of the data set '{data_set.folder}' has them; build it with --parts, or set "
            f"{by_parts[0]} to 0."
        )
    has_parts = bool(by_parts)
    settings = [config.size, config.views, config.seed, tasks, backgrounds, has_parts]
    key = digest_json([VERSION, fingerprint_index(data_set), base.fingerprint, settings])
    return LatentCache(
        data_set=data_set,
        folder=config.cache / f"{data_set.folder.resolve().name}-{base.name}-{key[:16]}",
        tasks=tasks,
        size=config.size,
        views=config.views,
        seed=config.seed,
        backgrounds=backgrounds,
        wanted=wanted,
        shards=shards,
        first_target=_number_entries(wanted[TARGET] * config.views, shards),
        first_reference=_number_entries(blocks * config.views, shards),
        has_mask=has_mask,
        prompts=prompts,
        has_parts=has_parts,
        texts=texts,
    )


def describe_targets(cache: LatentCache) -> str:
    """One sentence on the pictures that are trained on and those that are left out."""
    index = cache.data_set.index
    trained = np.array(index["split"].to_pylist()) == "train"
    targets = cache.wanted[TARGET]
    left_out = trained & ~targets
    characters = np.array(index["character"].to_pylist())
    without = set(characters[left_out]) - set(characters[targets])
    told = f"Training on {targets.sum()} pictures of {len(set(characters[targets]))} characters"
    if not left_out.any():
        return f"{told}."
    among = f", among them all of {len(without)} characters" if without else ""
    return (
        f"{told}; {left_out.sum()} pictures are left out{among}, because no other picture shows "
        "their character in the same outfit by the same artist."
    )


def measure_cache(cache: LatentCache, base: Base) -> int:
    """Bytes of the whole cache, by what VAE and text encoders make of a small input."""
    edge = 64
    with torch.inference_mode():
        latent = base.vae.encode(torch.zeros(1, 3, edge, edge))[0]
        prompt, y = base.encode_prompts([""], [(cache.size, cache.size)])
    channels, positions = len(latent), latent[0].numel() * (cache.size / edge) ** 2
    parts = LABELS**2 if cache.has_parts else 0
    backgrounds = np.where(cache.has_mask, len(cache.backgrounds), 1)
    targets = cache.wanted[TARGET].sum()
    references = sum((cache.wanted[concept] * backgrounds).sum() for concept in CONCEPTS)
    pictures = targets * (2 * channels + 2 + parts) + references * (2 * channels + 1 + parts)
    prompts = 2 * len(cache.texts) * (prompt.numel() + (0 if y is None else y.numel()))
    return int(cache.views * positions * pictures) + prompts


def check_disk(cache: LatentCache, base: Base) -> str:
    """One line on the disk space that the cache takes.

    Raises RetrievalError if the disk has no room for what is missing.
    """
    needed = measure_cache(cache, base)
    missing = needed - sum(path.stat().st_size for path in cache.folder.glob("*.safetensors"))
    home = next(path for path in cache.folder.absolute().parents if path.is_dir())
    free = shutil.disk_usage(home).free
    if missing > free:
        raise RetrievalError(
            f"The cache of latents and prompts needs {missing / GIB:.1f} GiB in '{home}', of which "
            f"{free / GIB:.1f} GiB are free; make room there, or set cache to a folder on another "
            f"disk or views below {cache.views}."
        )
    return f"The cache of latents and prompts takes {needed / GIB:.1f} GiB in '{cache.folder}'."


def fingerprint_index(data_set: DataSet) -> str:
    """SHA-256 of a data set's fingerprint and its index's file: changes with either."""
    index = hashlib.sha256((data_set.folder / INDEX).read_bytes()).hexdigest()
    return digest_json([data_set.info["fingerprint"], index])


def refuse_changed_data(data_set: DataSet, recorded: str) -> None:
    """RetrievalError if `fingerprint_index` is no longer what a run recorded at its start."""
    found = fingerprint_index(data_set)
    if found != recorded:
        raise RetrievalError(
            f"The data set '{data_set.folder}' was changed after this run had started (its "
            f"fingerprint is {found[:12]} and was {recorded[:12]}); restore it, or start a new run "
            "in another folder."
        )


def fill_cache(
    cache: LatentCache,
    base: Base,
    rank: int = 0,
    world: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Computes the shards that are missing; of several processes each computes its share.

    Args:
        base: with VAE and text encoders on the device that is to compute.
        rank, world: number of this process and of all. The cache is whole when all are done.
        on_progress: called with (shards done, shards in all) of this process's share.

    Raises:
        RetrievalError: a picture changed after the data set was built or cannot be read, the VAE
            gives NaN, or a shard cannot be written.
    """
    pictures, prompts = (
        [number for number in missing if number % world == rank] for missing in cache.find_missing()
    )
    total = len(pictures) + len(prompts)
    if not total:
        return
    description = {  # for people only
        "data_set": str(cache.data_set.folder.resolve()),
        "fingerprint": cache.data_set.info["fingerprint"],
        "base": base.fingerprint,
        "tasks": cache.tasks,
        "size": cache.size,
        "views": cache.views,
        "seed": cache.seed,
    }
    write_text(cache.folder / "cache.json", json.dumps(description, indent=2) + "\n")
    done = 0
    with torch.inference_mode():
        for number in prompts:
            _write_shard(cache, "prompts", number, _encode_prompts(cache, base, number))
            done += 1
            if on_progress is not None:
                on_progress(done, total)
        rows = {number: np.flatnonzero(cache.shards == number) for number in pictures}
        prepared = _prepare_ahead(cache, (row for group in rows.values() for row in group), world)
        for number, group in rows.items():
            encoded = [_encode_views(cache, base, int(row), next(prepared)) for row in group]
            tensors = {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]}
            _write_shard(cache, "pictures", number, tensors)
            done += 1
            if on_progress is not None:
                on_progress(done, total)


def _choose_pictures(data_set: DataSet, tasks: Iterable[Task]) -> dict[str, np.ndarray]:
    """`LatentCache.wanted`: the targets of the tasks, and all that their references may show."""
    wanted = {name: np.zeros(len(data_set), np.bool_) for name in (TARGET, *CONCEPTS)}
    for task in tasks:
        targets = data_set.find_targets(task)
        wanted[TARGET][targets] = True
        outfits, identities = data_set.outfits.numbers, data_set.identities.numbers
        alike = np.isin(outfits, outfits[targets])
        if task == "same character":
            wanted["figure"] |= alike
        else:
            same_face = np.isin(identities, identities[targets])
            wanted["clothes"] |= alike & data_set.has_head_box
            wanted["face"] |= same_face & data_set.has_head_box
    return wanted


def _number_entries(counts: np.ndarray, shards: np.ndarray) -> np.ndarray:
    """The number of entries of the same shard before each picture's; counts, shards: [N]."""
    before = np.cumsum(counts) - counts
    _, first, inverse = np.unique(shards, return_index=True, return_inverse=True)
    # Shards are runs of rows, but for -1, which has no entries.
    return before - before[first][inverse]


def _list_prompts(data_set: DataSet, targets: np.ndarray) -> tuple[list[str], np.ndarray]:
    """`LatentCache.texts` and `LatentCache.prompts`."""
    numbers = {text: i for i, text in enumerate(["", *CONCEPTS])}
    prompts = np.zeros(len(targets), np.int64)
    tags, captions = (data_set.index[name].to_pylist() for name in ("tags", "caption"))
    for row in np.flatnonzero(targets):
        prompts[row] = numbers.setdefault(write_prompt(tags[row], captions[row]), len(numbers))
    return list(numbers), prompts


def write_prompt(tags: Sequence[str] | None, caption: str | None) -> str:
    """The prompt of a picture: its tags with spaces for underscores, or its caption without tags.

    Up to three characters are an emoticon such as ^_^.
    """
    if not tags:
        return caption or ""
    return ", ".join(tag if len(tag) <= 3 else tag.replace("_", " ") for tag in tags)


def _prepare_ahead(cache: LatentCache, rows: Iterable[int], world: int) -> Iterator[Views]:
    """`prepare_views` of rows, on this process's share of the processors."""
    threads = max(1, (os.cpu_count() or 1) // world)
    waiting: deque[Any] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for row in rows:
            waiting.append(pool.submit(prepare_views, cache, int(row)))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def prepare_views(cache: LatentCache, row: int) -> Views:
    """The views of a picture in the order of its entries.

    Raises RetrievalError if it changed after the data set was built, or cannot be read.
    """
    data_set, size = cache.data_set, cache.size
    values = data_set.read_row(row)
    sample, path = data_set[row], data_set.find_picture(values)
    if hashlib.sha256(path.read_bytes()).hexdigest() != values["sha256"]:
        raise RetrievalError(
            f"'{path}' was changed after the data set '{data_set.folder}' was built; build it "
            "again."
        )

    def draw(kind: str, number: int, distribution: RandomView) -> tuple[Any, Colour]:
        """The view of that number, and the colour of its padding."""
        digest = hashlib.sha256(f"{cache.seed} {values['sha256']} {kind} {number}".encode())
        rng = np.random.default_rng(int.from_bytes(digest.digest()[:8], "big"))
        drawn = distribution.draw(rng)
        red, green, blue = rng.integers(0, 256, 3).tolist()
        return drawn if number else UNCHANGED, (red, green, blue)

    targets, content, face, parts = [], [], [], []
    unknown = np.full((size, size), UNKNOWN, np.uint8)
    for number in range(cache.views if cache.wanted[TARGET][row] else 0):
        view, fill = draw(TARGET, number, TARGET_VIEW)
        placement = place_region(find_figure_region(sample), size, view)
        targets.append(place_picture(sample.image, placement, fill))
        content.append(mask_box(placement.mirror(placement.inside), size))
        head = sample.head_box
        box = (0, 0, 0, 0) if head is None else placement.place_box(head)
        face.append(mask_box(box, size))
        parts.append(unknown if sample.parts is None else place_parts(sample.parts, placement))
    references, masks, reference_parts = [], [], []
    for concept in CONCEPTS:
        if not cache.wanted[concept][row]:
            continue
        for removed in cache.list_backgrounds(row):
            for number in range(cache.views):
                view, fill = draw(concept, number, REFERENCE_VIEW)
                cut = cut_reference(
                    sample, concept, size, fill, remove_background=removed, view=view
                )
                references.append(cut.image)
                whole = np.ones((size, size), np.bool_)
                masks.append(whole if cut.mask is None else cut.mask)
                reference_parts.append(unknown if cut.parts is None else cut.parts)

    def stack(squares: list[np.ndarray], dtype: type, *more: int) -> np.ndarray:
        return np.stack(squares) if squares else np.empty((0, size, size, *more), dtype)

    return Views(
        targets=stack(targets, np.uint8, 3),
        content=stack(content, np.bool_),
        face=stack(face, np.bool_),
        references=stack(references, np.uint8, 3),
        masks=stack(masks, np.bool_),
        parts=stack(parts, np.uint8),
        reference_parts=stack(reference_parts, np.uint8),
    )


def _encode_views(cache: LatentCache, base: Base, row: int, views: Views) -> dict[str, Tensor]:
    """The entries of a picture in its shard."""
    pixels = torch.from_numpy(np.concatenate([views.targets, views.references]))
    pieces = pixels.movedim(-1, 1).split(max(1, _ENCODED_PIXELS // cache.size**2))
    latents = torch.cat(
        [base.vae.encode(piece.float() / 127.5 - 1).half().cpu() for piece in pieces]
    )
    if not bool(latents.isfinite().all()):
        raise RetrievalError(
            f"The VAE gives values that are not finite for "
            f"'{cache.data_set.find_picture(cache.data_set.read_row(row))}'; choose another VAE, "
            "such as SDXL's that was made for fp16."
        )
    shown = tuple(latents.shape[2:])
    content, face = (
        resize_mask(torch.from_numpy(mask), shown).mul(255).round().byte()
        for mask in (views.content, views.face)
    )
    masks = F.adaptive_max_pool2d(torch.from_numpy(views.masks)[:, None].float(), shown)[:, 0] > 0
    targets, references = latents.split([len(views.targets), len(views.references)])
    entries = {
        "targets": targets,
        "content": content,
        "face": face,
        "references": references,
        "masks": masks,
    }
    if cache.has_parts:
        size = [LABELS * edge for edge in shown]
        for name in ("parts", "reference_parts"):
            labels = torch.from_numpy(getattr(views, name))[:, None]
            entries[name] = F.interpolate(labels, size, mode="nearest-exact")[:, 0]
    return entries


def _encode_prompts(cache: LatentCache, base: Base, number: int) -> dict[str, Tensor]:
    """The embeddings of a shard's prompts. SDXL is told a picture of this size, as at inference."""
    texts = cache.texts[number * PROMPTS : (number + 1) * PROMPTS]
    encoded = [
        base.encode_prompts(piece, [(cache.size, cache.size)] * len(piece))
        for piece in (
            texts[i : i + _ENCODED_PROMPTS] for i in range(0, len(texts), _ENCODED_PROMPTS)
        )
    ]
    tensors = {"context": torch.cat([context for context, _ in encoded]).half()}
    if encoded[0][1] is not None:
        tensors["y"] = torch.cat([y for _, y in encoded if y is not None]).half()
    return tensors


def _write_shard(cache: LatentCache, kind: str, number: int, tensors: dict[str, Tensor]) -> None:
    path = cache.name_shard(kind, number)
    for leftover in cache.folder.glob(f".{path.name}.*"):  # of a build that was killed
        leftover.unlink()
    save_safetensors(path, tensors, {})
