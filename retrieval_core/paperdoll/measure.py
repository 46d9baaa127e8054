"""Measures the bundled weights on held-out characters: see `main` for the command.

The judge classifies the generated pictures; its error on known truth is printed too. Numbers are
percentages of figures unless they say otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import RetrievalError
from ..network.controlnet import RetrievalControlNet
from ..sampling.presets import PRESETS
from .batches import render_any, stack_images
from .bundle import Bundle, load_bundle
from .cases import Case, drop_prompt, make_character_case, make_composition_case
from .generate import Sampling, apply_bank, draw_noise, encode_group, encode_groups, generate
from .judge import ATTRIBUTES, SCENE, Attributes, compute_chance, list_truth
from .model import PaperdollModel

BATCH = 40
SEEDS_EACH = 10

# Line of the measurement -> the judge's attributes that it averages.
LINES: dict[str, tuple[str, ...]] = {
    "hair style": ("hair style",),
    "hair colour": ("hair colour",),
    "eye colour": ("eye colour",),
    "garment kind": ("upper", "lower"),
    "garment colour": ("upper colour", "lower colour"),
}
FREE = ("pose", "expression", "background", "mirrored")

T = TypeVar("T")


def draw_in_batches(
    base: PaperdollModel,
    seed: int,
    cases: Sequence[T],
    draw: Callable[[Sequence[T], Tensor], Tensor],
    title: str,
    width: int = 1,
) -> Tensor:
    """One picture per case from `draw(cases of a batch, noise [B, C, 16, 16 * width])`.

    Picture i has the noise of `seed` and i, whatever the method.
    """
    pictures = []
    for start in tqdm(range(0, len(cases), BATCH), desc=title, disable=None, leave=False):
        batch = cases[start : start + BATCH]
        noise = [draw_noise(base, seed, start + i, width) for i in range(len(batch))]
        pictures.append(draw(batch, torch.cat(noise)))
    return torch.cat(pictures)


def read_figures(
    bundle: Bundle,
    how: Sampling,
    seed: int,
    cases: Sequence[Case],
    title: str,
    retrieve: bool = True,
) -> list[Attributes]:
    """The judge's attributes of one generated figure per case."""

    def draw(batch: Sequence[Case], noise: Tensor) -> Tensor:
        retrieval = None
        if retrieve:
            groups = [case.references for case in batch]
            tokens = encode_groups(bundle.base, bundle.network, groups)
            retrieval = apply_bank(bundle.network, tokens, how)
        return generate(bundle, [case.prompt for case in batch], noise, retrieval, how)

    return bundle.judge.read(draw_in_batches(bundle.base, seed, cases, draw, title))


def to_percent(hits: Sequence[bool]) -> float:
    return round(100 * float(np.mean(hits)), 2) if hits else float("nan")


def measure_matches(cases: Sequence[Case], found: Sequence[Attributes]) -> dict[str, float]:
    """Share of figures whose attributes are the references', by line, and their mean."""
    return _average_lines(
        lambda name: to_percent([f[name] == c.wanted[name] for c, f in zip(cases, found)])
    )


def _average_lines(rate: Callable[[str], float]) -> dict[str, float]:
    """The mean of `rate(attribute)` for each of `LINES`, after the mean of all lines."""
    rates = {line: mean(rate(name) for name in names) for line, names in LINES.items()}
    return {"mean": round(mean(rates.values()), 2), **{k: round(v, 2) for k, v in rates.items()}}


def measure_following(cases: Sequence[Case], found: Sequence[Attributes]) -> dict[str, float]:
    """Share of figures whose pose, expression and background are what the prompt says."""
    return {
        name: to_percent([f[name] == c.said[name] for c, f in zip(cases, found)]) for name in SCENE
    }


def measure_leak(cases: Sequence[Case], found: Sequence[Attributes]) -> float:
    """Share of figures that show the references' background."""
    return to_percent([f["background"] == c.reference_background for c, f in zip(cases, found)])


def measure_diversity(found: Sequence[Attributes], each: int) -> dict[str, float]:
    """Share of pairs of one conditioning's figures (runs of `each`) that differ, by attribute."""
    runs = [found[i : i + each] for i in range(0, len(found), each)]
    return {
        name: to_percent([a[name] != b[name] for run in runs for a, b in combinations(run, 2)])
        for name in FREE
    }


def compute_chance_levels() -> dict[str, float]:
    """The attribute match of guessing, as `measure_matches` gives it."""
    return _average_lines(lambda name: 100 * compute_chance(name))


def measure_judge(bundle: Bundle, seed: int, count: int) -> dict[str, float]:
    """The judge's accuracy on rendered figures of known truth, encoded and decoded by the VAE."""
    drawn = render_any(seed + 90_000, count)
    images = stack_images(drawn)
    with torch.inference_mode():
        read = bundle.judge.read(bundle.base.vae.decode(bundle.base.vae.encode(images)))
    known = [list_truth(d.figure) for d in drawn]
    return {
        name: to_percent([a[name] == b[name] for a, b in zip(read, known)]) for name in ATTRIBUTES
    }


def check_exactness(bundle: Bundle, how: Sampling) -> dict[str, bool]:
    """Whether retrieval that must change nothing is bit for bit the base model (two figures)."""
    base, network = bundle.base, bundle.network
    prompts, noise = ["waving, smile, beach", ""], base.noise(2, torch.Generator().manual_seed(0))
    plain = generate(bundle, prompts, noise, None, how)
    case = make_character_case(0, 0)
    fresh = RetrievalControlNet.from_base(
        base.unet.state_dict(), "paperdoll", config=base.unet.config
    ).eval()
    off = replace(how, strength=0.0)
    cases = {
        "strength 0": (bundle, encode_group(base, network, case.references), off),
        "empty bank": (bundle, encode_group(base, network, []), how),
        "fresh network": (
            Bundle(base, fresh, bundle.judge),
            encode_group(base, fresh, case.references),
            how,
        ),
    }
    return {
        name: torch.equal(generate(b, prompts, noise, apply_bank(b.network, tokens, h), h), plain)
        for name, (b, tokens, h) in cases.items()
    }


def measure(bundle: Bundle, count: int, seed: int, how: Sampling) -> dict[str, Any]:
    """All lines of the measurement on `count` figures each, as one JSON-able dict."""
    read = partial(read_figures, bundle, how, seed)
    same = [make_character_case(seed, i) for i in range(count)]
    composed = [make_composition_case(seed, i) for i in range(count)]
    open_ended = [drop_prompt(same[i // SEEDS_EACH]) for i in range(count)]
    plain = read(same, "without retrieval", retrieve=False)
    with_four = read(same, "four references")
    with_parts = read(composed, "composition")
    plain_parts = read(composed, "composition, without", retrieve=False)
    open_plain = read(open_ended, "empty prompt, without", retrieve=False)
    open_four = read(open_ended, "empty prompt")
    followed = {
        "base": measure_following(same, plain),
        "four references": measure_following(same, with_four),
        "base, composition's prompts": measure_following(composed, plain_parts),
        "composition": measure_following(composed, with_parts),
    }
    pairs = (("four references", "base"), ("composition", "base, composition's prompts"))
    for ours, base in pairs:
        followed[f"{ours} minus base, points"] = {
            name: round(followed[ours][name] - followed[base][name], 2) for name in SCENE
        }
    return {
        "figures": count,
        "seed": seed,
        "attribute match with four references": {
            "with retrieval": measure_matches(same, with_four),
            "without retrieval": measure_matches(same, plain),
            "chance": compute_chance_levels(),
        },
        "concept composition": {
            "with retrieval": measure_matches(composed, with_parts),
            "without retrieval": measure_matches(composed, plain_parts),
            "chance": compute_chance_levels(),
        },
        "pose, expression and background follow the text": followed,
        "reference background appears": {
            "chance": round(100 * compute_chance("background"), 2),
            "four references": measure_leak(same, with_four),
            "composition": measure_leak(composed, with_parts),
            "four references, empty prompt": measure_leak(open_ended, open_four),
            "base, same prompts": measure_leak(same, plain),
            "base, empty prompt": measure_leak(open_ended, open_plain),
            "standard error": round(100 * float(np.sqrt(0.125 * 0.875 / count)), 2),
        },
        "diversity, pairs of seeds that differ": {
            "with retrieval": measure_diversity(open_four, SEEDS_EACH),
            "base": measure_diversity(open_plain, SEEDS_EACH),
            "world": {name: round(100 * (1 - compute_chance(name)), 2) for name in FREE},
        },
        "bit for bit the base model": check_exactness(bundle, how),
        "judge on known truth": measure_judge(bundle, seed, count),
    }


def make_parser(module: str, count: int) -> argparse.ArgumentParser:
    """The options that all measurements share."""
    parser = argparse.ArgumentParser(prog=f"python -m retrieval_core.paperdoll.{module}")
    parser.add_argument("--count", type=int, default=count, help="figures a line")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other characters")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--weights", type=Path, help="folder of the weights, default: bundled")
    return parser


def print_result(options: argparse.Namespace, work: Callable[[], dict[str, Any]]) -> int:
    """Prints a measurement as JSON, or what the user can mend; the exit status."""
    try:
        if options.count < 1:
            raise RetrievalError(
                f"Measuring {options.count} figures is not possible; give 1 or more."
            )
        result = work()
    except RetrievalError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(result, indent=None if options.json else 2))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("measure", 500)
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--cfg", type=float, default=Sampling.cfg)
    parser.add_argument("--strength", type=float)
    parser.add_argument("--guidance", choices=("cond", "both"))
    parser.add_argument("--end", type=float, default=Sampling.end)
    parser.add_argument("--token-budget", type=int, help="tokens a site, default: all")
    parser.add_argument("--preset", choices=PRESETS, default=Sampling.preset)
    options = parser.parse_args(arguments)
    names = ("steps", "cfg", "strength", "guidance", "token_budget", "end", "preset")
    how = Sampling(**{name: getattr(options, name) for name in names})
    return print_result(
        options,
        lambda: measure(load_bundle(options.weights), options.count, options.seed, how),
    )


if __name__ == "__main__":
    sys.exit(main())
