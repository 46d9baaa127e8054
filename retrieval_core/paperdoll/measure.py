"""Measures the bundled weights on held-out characters: see `main` for the command.

Everything is read off generated pictures by the judge, whose own error on known truth is printed
too. Numbers are percentages of figures unless they say otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import RetrievalError
from ..network.controlnet import RetrievalControlNet
from ..sampling.applications import Retrieval
from .batches import render_any, to_images
from .bundle import Bundle, load_bundle
from .cases import (
    Case,
    drop_prompt,
    list_references,
    make_character_case,
    make_composition_case,
)
from .generate import Sampling, apply_bank, encode_group, encode_groups, generate
from .judge import ATTRIBUTES, SCENE, compute_chance, list_truth

BATCH = 40
SEEDS_EACH = 10

# The lines of the measurement: a name and the judge's attributes averaged under it.
LINES: dict[str, tuple[str, ...]] = {
    "hair style": ("hair style",),
    "hair colour": ("hair colour",),
    "eye colour": ("eye colour",),
    "garment kind": ("upper", "lower"),
    "garment colour": ("upper colour", "lower colour"),
}
FREE = ("pose", "expression", "background", "mirrored")

Reading = dict[str, str]


class Measurement:
    """Generates and reads; `noise_seed` decides the noise of every figure."""

    def __init__(self, bundle: Bundle, how: Sampling, seed: int) -> None:
        self.bundle, self.how, self.seed = bundle, how, seed

    def noise(self, start: int, count: int) -> Tensor:
        base = self.bundle.base
        rows = [
            base.noise(1, torch.Generator().manual_seed(self.seed * 1_000_003 + start + i))
            for i in range(count)
        ]
        return torch.cat(rows)

    def _retrieval(self, cases: Sequence[Case]) -> Retrieval:
        network = self.bundle.network
        tokens = encode_groups(self.bundle.base, network, list_references(cases))
        return apply_bank(network, tokens, self.how)

    def read(self, cases: Sequence[Case], retrieve: bool, title: str) -> list[Reading]:
        """What the judge reads off one figure a case."""
        readings: list[Reading] = []
        with tqdm(total=len(cases), desc=title, disable=None, leave=False) as bar:
            for start in range(0, len(cases), BATCH):
                part = cases[start : start + BATCH]
                bundle = self.bundle
                retrieval = self._retrieval(part) if retrieve else None
                noise = self.noise(start, len(part))
                pictures = generate(bundle, [c.prompt for c in part], noise, retrieval, self.how)
                readings += bundle.judge.read(pictures)
                bar.update(len(part))
        return readings


def to_percent(hits: Sequence[bool]) -> float:
    return round(100 * float(np.mean(hits)), 2) if hits else float("nan")


def measure_matches(cases: Sequence[Case], readings: Sequence[Reading]) -> dict[str, float]:
    """Share of figures whose attributes are the references', by line, and their mean."""
    rates = {
        line: mean(
            to_percent([r[name] == c.wanted[name] for c, r in zip(cases, readings)])
            for name in names
        )
        for line, names in LINES.items()
    }
    return {"mean": round(mean(rates.values()), 2), **{k: round(v, 2) for k, v in rates.items()}}


def measure_following(cases: Sequence[Case], readings: Sequence[Reading]) -> dict[str, float]:
    """Share of figures whose pose, expression and background are what the prompt says."""
    return {
        name: to_percent([r[name] == c.said[name] for c, r in zip(cases, readings)])
        for name in SCENE
    }


def measure_leak(cases: Sequence[Case], readings: Sequence[Reading]) -> float:
    """Share of figures that stand before the references' background."""
    pairs = zip(cases, readings)
    return to_percent([r["background"] == c.reference_background for c, r in pairs])


def measure_diversity(readings: Sequence[Reading], each: int) -> dict[str, float]:
    """Share of pairs of one conditioning's figures (runs of `each`) that differ, by attribute."""
    runs = [readings[i : i + each] for i in range(0, len(readings), each)]
    return {
        name: to_percent([a[name] != b[name] for run in runs for a, b in combinations(run, 2)])
        for name in FREE
    }


def compute_chance_levels() -> dict[str, float]:
    rates = {line: 100 * mean(compute_chance(n) for n in names) for line, names in LINES.items()}
    return {"mean": round(mean(rates.values()), 2), **{k: round(v, 2) for k, v in rates.items()}}


def measure_judge(bundle: Bundle, seed: int, count: int) -> dict[str, float]:
    """The judge's accuracy on rendered figures of known truth, as the VAE gives them back."""
    drawn = render_any(seed + 90_000, count)
    images = to_images(np.stack([d.image for d in drawn]))
    with torch.inference_mode():
        read = bundle.judge.read(bundle.base.vae.decode(bundle.base.vae.encode(images)))
    known = [list_truth(d.figure) for d in drawn]
    return {
        name: to_percent([a[name] == b[name] for a, b in zip(read, known)]) for name in ATTRIBUTES
    }


def check_exactness(bundle: Bundle, how: Sampling) -> dict[str, bool]:
    """Whether what must be the base model's output is that bit for bit (two figures each)."""
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


def measure(bundle: Bundle, count: int, seed: int, how: Sampling | None = None) -> dict:
    """All lines of the measurement on `count` figures each, as one JSON-able dict.

    Raises:
        RetrievalError: fewer than one figure.
    """
    if count < 1:
        raise RetrievalError(f"Measuring {count} figures is not possible; give 1 or more.")
    how = how or Sampling()
    run = Measurement(bundle, how, seed)
    same = [make_character_case(seed, i) for i in range(count)]
    composed = [make_composition_case(seed, i) for i in range(count)]
    open_ended = [drop_prompt(same[i // SEEDS_EACH]) for i in range(count)]
    plain = run.read(same, False, "without retrieval")
    with_four = run.read(same, True, "four references")
    with_parts = run.read(composed, True, "composition")
    plain_parts = run.read(composed, False, "composition, without")
    open_plain = run.read(open_ended, False, "empty prompt, without")
    open_four = run.read(open_ended, True, "empty prompt")
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m retrieval_core.paperdoll.measure")
    parser.add_argument("--count", type=int, default=500, help="figures a line")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other characters")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--weights", type=Path, help="folder of the weights, default: bundled")
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--cfg", type=float, default=Sampling.cfg)
    parser.add_argument("--strength", type=float)
    parser.add_argument("--guidance", choices=("cond", "both"))
    parser.add_argument("--end", type=float, default=Sampling.end)
    parser.add_argument("--token-budget", type=int, help="tokens a site, default: all")
    options = parser.parse_args(arguments)
    how = Sampling(
        options.steps,
        options.cfg,
        strength=options.strength,
        guidance=options.guidance,
        token_budget=options.token_budget,
        end=options.end,
    )
    try:
        result = measure(load_bundle(options.weights), options.count, options.seed, how)
    except RetrievalError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(result, indent=None if options.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
