"""Measures the controls on held-out paper-doll characters: see `main` for the command.

What token budgets and pooled queries lose, what masks keep out, and whether two regions
give each its own character. Everything is read off generated pictures by the judge; numbers are
percentages.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..bank.token_budget import AUTOMATIC, Budget, choose_budgets
from ..errors import RetrievalError
from ..network.retrieval_site import RetrievalSite, choose_query_pools
from ..network.unet import SD15, SDXL, UNetConfig
from ..sampling.applications import Application
from ..sampling.sampler import Denoise, make_guided_denoiser, sample
from .bundle import Bundle, load_bundle
from .cases import (
    REFERENCES,
    Case,
    drop_prompt,
    list_references,
    make_character_case,
    make_composition_case,
)
from .generate import Sampling, apply_bank, encode_groups
from .judge import compute_chance
from .measure import (
    BATCH,
    Measurement,
    Reading,
    compute_chance_levels,
    measure_following,
    measure_leak,
    measure_matches,
)
from .world import SIZE

# Name -> U-Net and edge of the latent at the base's own picture size.
LARGER_BASES = {"SD 1.5": (SD15, 64), "SDXL": (SDXL, 128)}
TASKS = {"four references": make_character_case, "composition": make_composition_case}


def compute_merging_ratios(config: UNetConfig, edge: int) -> dict[int, float]:
    """Latent pixels that a token spans -> how many tokens the automatic budget makes one of.

    Args:
        edge: of the latents of `REFERENCES` unmasked references.
    """
    factors = config.site_downsampling()
    budgets = choose_budgets(AUTOMATIC, factors, (edge, edge))
    tokens = {site: REFERENCES * (-(-edge // factor)) ** 2 for site, factor in factors.items()}
    return {f: max(1.0, tokens[site] / (budgets[site] or 1)) for site, f in factors.items()}


def imitate_ratios(ratios: Mapping[int, float], bundle: Bundle) -> dict[str, int]:
    """Token budgets by site at which paper dolls' tokens merge at the ratios of another base."""
    edge = bundle.base.latent_size
    return {
        site: math.ceil(REFERENCES * (edge // factor) ** 2 / ratios[factor])
        for site, factor in bundle.network.config.site_downsampling().items()
    }


def measure_budgets(bundle: Bundle, count: int, seed: int, how: Sampling) -> dict[str, Any]:
    """Attribute match with all tokens and with automatic budgets: the paper dolls' own, where
    little merges, and at the merging ratios of larger bases."""
    budgets: dict[str, Budget] = {"all tokens": None, "automatic": AUTOMATIC}
    for name, (config, edge) in LARGER_BASES.items():
        ratios = compute_merging_ratios(config, edge)
        merged = ", ".join(f"{ratio:g}x" for ratio in ratios.values())
        budgets[f"ratios of {name} ({merged})"] = imitate_ratios(ratios, bundle)
    runs = {
        name: Measurement(bundle, replace(how, token_budget=budget), seed)
        for name, budget in budgets.items()
    }
    return _compare(runs, count, seed)


def measure_pooling(bundle: Bundle, count: int, seed: int, how: Sampling) -> dict[str, Any]:
    """Attribute match with queries pooled two by two at the sites of the finest level, as networks
    of the larger bases have them. This one was not trained for it.
    """
    pooled = replace(bundle, network=copy.deepcopy(bundle.network))
    for site, pool in choose_query_pools(pooled.network.config, 2).items():
        layer = pooled.network.retrieval[site]
        assert isinstance(layer, RetrievalSite)
        layer.pool = pool
    runs = {"each position": bundle, "pooled": pooled}
    return _compare({name: Measurement(b, how, seed) for name, b in runs.items()}, count, seed)


def _compare(runs: Mapping[str, Measurement], count: int, seed: int) -> dict[str, Any]:
    """Attribute match of runs from the same noise, and what each loses by the first."""
    lines: dict[str, Any] = {}
    for task, make in TASKS.items():
        cases = [make(seed, i) for i in range(count)]
        rates = {
            name: measure_matches(cases, run.read(cases, True, f"{task}, {name}"))
            for name, run in runs.items()
        }
        first = next(iter(rates.values()))["mean"]
        lost = {name: round(first - rate["mean"], 2) for name, rate in rates.items()}
        lines[task] = {**rates, "lost, points": dict(list(lost.items())[1:])}
    return lines


def measure_masks(bundle: Bundle, count: int, seed: int, how: Sampling) -> dict[str, Any]:
    """How often figures stand before the references' background, with masks and without."""
    run = Measurement(bundle, how, seed)
    lines: dict[str, Any] = {"chance": round(100 * compute_chance("background"), 2)}
    for masked in (True, False):
        cases = [make_character_case(seed, i, masked=masked) for i in range(count)]
        silent = [drop_prompt(case) for case in cases]
        name = "masked" if masked else "not masked"
        lines[name] = {
            "background named by the prompt": measure_leak(cases, run.read(cases, True, name)),
            "empty prompt": measure_leak(silent, run.read(silent, True, f"{name}, empty prompt")),
        }
    return lines


def measure_regions(bundle: Bundle, count: int, seed: int, how: Sampling) -> dict[str, Any]:
    """Two characters in one picture, each of them given a half of it as its region.

    The base's own self-attention spans both halves and mixes them a little; "prompts by area"
    leaves it no chance, as a host's area conditioning does: each half is denoised on its own.
    """
    lefts = [make_character_case(seed, 2 * i) for i in range(count)]
    rights = [make_character_case(seed, 2 * i + 1) for i in range(count)]
    lines: dict[str, Any] = {"chance": compute_chance_levels()}
    settings: dict[str, dict[str, Any]] = {
        "two regions": {},
        "two regions, kept apart": {"apart": 1.0},
        "two regions, kept apart for half of sampling": {"apart": 0.5},
        "two regions, prompts by area": {"by_area": True},
        "without retrieval": {"retrieve": False},
    }
    for name, given in settings.items():
        left, right = read_halves(bundle, lefts, rights, seed, how, **given)
        lines[name] = {
            "left": measure_matches(lefts, left),
            "right": measure_matches(rights, right),
            "left is the right one's": measure_matches(rights, left)["mean"],
            "right is the left one's": measure_matches(lefts, right)["mean"],
            "text followed on the left": measure_following(lefts, left),
        }
    return lines


def read_halves(
    bundle: Bundle,
    lefts: Sequence[Case],
    rights: Sequence[Case],
    seed: int,
    how: Sampling,
    **given: Any,
) -> tuple[list[Reading], list[Reading]]:
    """What the judge reads off the two halves of pictures twice as wide, one a pair of cases.

    Args:
        given: `retrieve`, `by_area` and `apart`, see `generate_pairs`.
    """
    readings: tuple[list[Reading], list[Reading]] = ([], [])
    with tqdm(total=len(lefts), desc="two regions", disable=None, leave=False) as bar:
        for start in range(0, len(lefts), BATCH):
            part = slice(start, start + BATCH)
            noise = _wide_noise(bundle, seed, start, len(lefts[part]))
            pictures = generate_pairs(bundle, lefts[part], rights[part], noise, how, **given)
            for found, half in zip(readings, pictures.split(SIZE, -1), strict=True):
                found += bundle.judge.read(half)
            bar.update(len(pictures))
    return readings


def generate_pairs(
    bundle: Bundle,
    lefts: Sequence[Case],
    rights: Sequence[Case],
    noise: Tensor,
    how: Sampling,
    retrieve: bool = True,
    by_area: bool = False,
    apart: float = 0.0,
) -> Tensor:
    """Pictures [B, 3, 64, 128] of two characters each, the prompt being the left one's.

    Args:
        noise: [B, C, 16, 32].
        by_area: the halves are denoised one by one, each with its part of both regions.
        apart: see `Retrieval`.
    """
    base, applied = bundle.base, []
    if retrieve:
        for cases, place in ((lefts, 0), (rights, 1)):
            tokens = encode_groups(base, bundle.network, list_references(cases))
            one = replace(apply_bank(bundle.network, tokens, how), apart=apart)
            applied.append(_in_half(one, place))
    unet = bundle.network.apply_decoder(base.unet) if retrieve else base.unet
    with torch.inference_mode():
        cond = base.text.encode([case.prompt for case in lefts])
        uncond = base.text.encode([""] * len(lefts))

        def denoiser(active: Sequence[Application]) -> Denoise:
            return make_guided_denoiser(unet, base.schedule, cond, uncond, how.cfg, active)

        denoise = denoiser(applied)
        if by_area:
            halves = [denoiser([_crop(one, place) for one in applied]) for place in range(2)]

            def denoise(x: Tensor, timestep: int) -> Tensor:
                parts = x.chunk(2, -1)
                return torch.cat([half(p, timestep) for half, p in zip(halves, parts)], -1)

        return base.vae.decode(sample(denoise, noise, base.schedule, how.steps, how.sampler))


def _crop(retrieval: Application, place: int) -> Application:
    assert retrieval.region is not None
    return replace(retrieval, region=retrieval.region.chunk(2, -1)[place])


def _in_half(retrieval: Application, place: int) -> Application:
    region = torch.zeros(SIZE, 2 * SIZE)
    region[:, place * SIZE : (place + 1) * SIZE] = 1
    return replace(retrieval, region=region)


def _wide_noise(bundle: Bundle, seed: int, start: int, count: int) -> Tensor:
    rows = []
    for i in range(start, start + count):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        rows.append(torch.cat(bundle.base.noise(2, generator).split(1), -1))
    return torch.cat(rows)


LINES = {
    "token budget": measure_budgets,
    "query pooling": measure_pooling,
    "masks": measure_masks,
    "regions": measure_regions,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m retrieval_core.paperdoll.measure_controls")
    parser.add_argument("--count", type=int, default=200, help="figures a line")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other characters")
    parser.add_argument("--only", choices=LINES, nargs="+", default=list(LINES))
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--weights", type=Path, help="folder of the weights, default: bundled")
    options = parser.parse_args(arguments)
    try:
        if options.count < 1:
            raise RetrievalError(
                f"Measuring {options.count} figures is not possible; give 1 or more."
            )
        bundle = load_bundle(options.weights)
        result: dict[str, Any] = {"figures": options.count, "seed": options.seed}
        for name in options.only:
            result[name] = LINES[name](bundle, options.count, options.seed, Sampling())
    except RetrievalError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(result, indent=None if options.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
