"""Measures how alike the characters of a batch are, drawn without references: see `main`.

The first line is the base model, each further one a setting of `ConsistentBatch`, all from the same
prompts and noise. The judge classifies the pictures; numbers are percentages of pairs of a batch
(agreement, difference) or of pictures (text), but for the cost of a step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import combinations, product
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import RetrievalError
from ..sampling.sampler import make_guided_denoiser
from ..training_free.consistent_batch import (
    END,
    START,
    STRENGTH,
    ConsistentBatch,
    share_subjects,
)
from .bundle import BASE_FILE, JUDGE_FILE, find_bundled
from .generate import Sampling, draw_noise, sample_pictures
from .judge import SCENE, Attributes, load_judge
from .measure import LINES, make_parser, measure_diversity, print_result, to_percent
from .model import PaperdollModel, load_base
from .world import Scene, random_scene

AT_ONCE = 40  # pictures
TIMED_STEPS = 12


def draw_scenes(seed: int, index: int, batch: int, one_prompt: bool) -> list[Scene]:
    """The scenes of the pictures of batch `index`: a random one each, or one for all of them."""
    rng = np.random.default_rng([seed, index, 40])
    if one_prompt:
        return [random_scene(rng)] * batch
    return [random_scene(rng) for _ in range(batch)]


def list_tags(scene: Scene, one_prompt: bool) -> dict[str, str]:
    """Attribute -> what the prompt says of it; one prompt for all pictures leaves the pose open."""
    said = dict(zip(SCENE, scene.tags(), strict=True))
    if one_prompt:
        del said["pose"]
    return said


def draw_batches(
    base: PaperdollModel,
    prompts: Sequence[str],
    seed: int,
    batch: int,
    how: Sampling,
    consistent: ConsistentBatch | None = None,
) -> Tensor:
    """One picture per prompt, [N, 3, 64, 64] in 0..1; runs of `batch` of them are drawn together.

    Picture i has the noise of `seed` and i, whatever the setting.
    """
    pictures, at_once = [], max(1, AT_ONCE // batch) * batch
    for start in range(0, len(prompts), at_once):
        part = prompts[start : start + at_once]
        noise = torch.cat([draw_noise(base, seed, start + i) for i in range(len(part))])
        sharing = nullcontext()
        if consistent is not None:
            sharing = share_subjects(base.unet, consistent, len(part) // batch, batch)
        with sharing:
            pictures.append(sample_pictures(base, base.unet, part, noise, [], how))
    return torch.cat(pictures)


def measure_agreement(found: Sequence[Attributes], batch: int) -> dict[str, float]:
    """Share of a batch's pairs with the same value, by line of the measurement, and their mean."""
    runs = [found[i : i + batch] for i in range(0, len(found), batch)]

    def agree(name: str) -> float:
        return to_percent([a[name] == b[name] for run in runs for a, b in combinations(run, 2)])

    rates = {line: round(mean(map(agree, names)), 2) for line, names in LINES.items()}
    return {"mean": round(mean(rates.values()), 2), **rates}


@torch.inference_mode()
def measure_step(base: PaperdollModel, batch: int, how: Sampling) -> float:
    """Seconds of a step in which a batch shares its subject, over one of the base's: the median of
    pairs of steps, one after the other."""
    noise = base.noise(batch, torch.Generator().manual_seed(0))
    text = base.text.encode([""] * batch)
    denoise = make_guided_denoiser(base.unet, base.schedule, text, text, how.cfg)
    timestep, ratios = int((1 - (START + END) / 2) * base.schedule.steps), []
    for _ in range(TIMED_STEPS):
        seconds = []
        for sharing in (nullcontext(), share_subjects(base.unet, ConsistentBatch(), 1, batch)):
            with sharing:
                started = time.perf_counter()
                denoise(noise, timestep)
                seconds.append(time.perf_counter() - started)
        ratios.append(seconds[1] / seconds[0])
    return round(median(ratios), 3)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The measurement that the command line asks for, as one JSON-able dict."""
    if options.batch < 2:
        raise RetrievalError(
            f"A batch of {options.batch} has nothing to agree with; give --batch 2 or more."
        )
    base = load_base(find_bundled(BASE_FILE, options.weights))
    judge = load_judge(find_bundled(JUDGE_FILE, options.weights))
    how = Sampling(options.steps, options.cfg)
    scenes = [
        scene
        for i in range(options.count)
        for scene in draw_scenes(options.seed, i, options.batch, options.one_prompt)
    ]
    said = [list_tags(scene, options.one_prompt) for scene in scenes]
    prompts = [", ".join(tags.values()) for tags in said]
    result: dict[str, Any] = {
        "batches": options.count,
        "pictures of a batch": options.batch,
        "seed": options.seed,
        "prompts": "one a batch, without a pose" if options.one_prompt else "one a picture",
        "sharing step over the base's": measure_step(base, options.batch, how),
    }

    def add_line(name: str, consistent: ConsistentBatch | None = None) -> None:
        drawn = draw_batches(base, prompts, options.seed, options.batch, how, consistent)
        found = judge.read(drawn)
        result[name] = {
            "agreement": measure_agreement(found, options.batch),
            "text followed": {
                tag: to_percent([f[tag] == words[tag] for f, words in zip(found, said)])
                for tag in said[0]
            },
            "pairs that differ": measure_diversity(found, options.batch),
        }

    add_line("without")
    settings = product(options.strength, options.start, options.end, options.anchors)
    for strength, start, end, anchors in settings:
        name = f"strength {strength:g}, {start:g} to {end:g}, anchors {anchors}"
        add_line(name, ConsistentBatch(strength, start, end, anchors))
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("measure_consistent", 50)
    parser.add_argument("--groups", type=int, dest="count", help="the same as --count: batches")
    parser.add_argument("--batch", type=int, default=4, help="pictures of a batch")
    parser.add_argument("--one-prompt", action="store_true", help="for all pictures of a batch")
    parser.add_argument("--strength", type=float, nargs="+", default=[STRENGTH])
    parser.add_argument("--start", type=float, nargs="+", default=[START])
    parser.add_argument("--end", type=float, nargs="+", default=[END])
    parser.add_argument("--anchors", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--cfg", type=float, default=Sampling.cfg)
    options = parser.parse_args(arguments)
    return print_result(options, lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
