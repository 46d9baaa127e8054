"""Measures the controls on held-out paper-doll characters: see `main` for the command.

Attribute match lost by token budgets and pooled queries, leak of the references' background with
and without masks, and two characters in two regions. The judge classifies the generated pictures;
numbers are percentages.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..bank.token_budget import AUTOMATIC, Budget, choose_budgets
from ..network.retrieval_site import choose_query_pools
from ..network.unet import SD15, SDXL, UNetConfig
from ..sampling.applications import Application
from ..sampling.sampler import Denoise, make_guided_denoiser, sample
from .bundle import Bundle, load_bundle
from .cases import REFERENCES, Case, drop_prompt, make_character_case, make_composition_case
from .generate import Sampling, apply_bank, encode_groups
from .judge import compute_chance
from .measure import (
    compute_chance_levels,
    draw_in_batches,
    make_parser,
    measure_following,
    measure_leak,
    measure_matches,
    print_result,
    read_figures,
)
from .world import SIZE

# Name -> U-Net and edge of the latent at the base's own picture size.
LARGER_BASES = {"SD 1.5": (SD15, 64), "SDXL": (SDXL, 128)}
TASKS = {"four references": make_character_case, "composition": make_composition_case}


def compute_merging_ratios(config: UNetConfig, edge: int) -> dict[int, float]:
    """Downsampling of a site -> how many tokens the automatic budget merges into one there.

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
    runs = {name: (bundle, replace(how, token_budget=size)) for name, size in budgets.items()}
    return _compare(runs, count, seed)


def measure_pooling(bundle: Bundle, count: int, seed: int, how: Sampling) -> dict[str, Any]:
    """Attribute match with 2 x 2 query pooling at full-resolution sites, the larger bases' default.

    The bundled network was not trained with it.
    """
    pooled = replace(bundle, network=copy.deepcopy(bundle.network))
    for site, pool in choose_query_pools(pooled.network.config, 2).items():
        pooled.network.retrieval[site].pool = pool
    return _compare({"each position": (bundle, how), "pooled": (pooled, how)}, count, seed)


def _compare(runs: Mapping[str, tuple[Bundle, Sampling]], count: int, seed: int) -> dict[str, Any]:
    """Attribute match of runs from the same noise, and what each loses compared with the first."""
    lines: dict[str, Any] = {}
    for task, make in TASKS.items():
        cases = [make(seed, i) for i in range(count)]
        rates = {
            name: measure_matches(cases, read_figures(*run, seed, cases, f"{task}, {name}"))
            for name, run in runs.items()
        }
        first = next(iter(rates.values()))["mean"]
        lost = {name: round(first - rates[name]["mean"], 2) for name in list(rates)[1:]}
        lines[task] = {**rates, "lost, points": lost}
    return lines


def measure_masks(bundle: Bundle, count: int, seed: int, how: Sampling) -> dict[str, Any]:
    """How often figures show the references' background, with masks and without."""
    read = partial(read_figures, bundle, how, seed)
    lines: dict[str, Any] = {"chance": round(100 * compute_chance("background"), 2)}
    for masked in (True, False):
        cases = [make_character_case(seed, i, masked=masked) for i in range(count)]
        silent = [drop_prompt(case) for case in cases]
        name = "masked" if masked else "not masked"
        lines[name] = {
            "background named by the prompt": measure_leak(cases, read(cases, name)),
            "empty prompt": measure_leak(silent, read(silent, f"{name}, empty prompt")),
        }
    return lines


def measure_regions(bundle: Bundle, count: int, seed: int, how: Sampling) -> dict[str, Any]:
    """Two characters in one picture, each with one half as its region.

    The base's self-attention spans both halves and mixes them a little; with "prompts by area"
    each half is denoised separately, as by a host's area conditioning.
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

        def draw(batch: Sequence[tuple[Case, Case]], noise: Tensor) -> Tensor:
            return generate_pairs(bundle, *zip(*batch), noise, how, **given)  # noqa: B023

        pairs = list(zip(lefts, rights))
        pictures = draw_in_batches(bundle.base, seed, pairs, draw, "two regions", width=2)
        left, right = (bundle.judge.read(half) for half in pictures.split(SIZE, -1))
        lines[name] = {
            "left": measure_matches(lefts, left),
            "right": measure_matches(rights, right),
            "left is the right one's": measure_matches(rights, left)["mean"],
            "right is the left one's": measure_matches(lefts, right)["mean"],
            "text followed on the left": measure_following(lefts, left),
        }
    return lines


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
        by_area: the halves are denoised separately, each with its crop of both regions.
        apart: see `Retrieval`.
    """
    base, applied = bundle.base, []
    if retrieve:
        for half, cases in enumerate((lefts, rights)):
            tokens = encode_groups(base, bundle.network, [case.references for case in cases])
            one = replace(apply_bank(bundle.network, tokens, how), apart=apart)
            applied.append(_limit_to_half(one, half))
    unet = bundle.network.apply_decoder(base.unet) if retrieve else base.unet
    with torch.inference_mode():
        cond = base.text.encode([case.prompt for case in lefts])
        uncond = base.text.encode([""] * len(lefts))

        def denoiser(active: Sequence[Application]) -> Denoise:
            return make_guided_denoiser(unet, base.schedule, cond, uncond, how.cfg, active)

        denoise = denoiser(applied)
        if by_area:
            denoisers = [denoiser([_crop(one, half) for one in applied]) for half in range(2)]

            def denoise(x: Tensor, timestep: int) -> Tensor:
                halves = zip(denoisers, x.chunk(2, -1))
                return torch.cat([one(half, timestep) for one, half in halves], -1)

        return base.vae.decode(sample(denoise, noise, base.schedule, how.steps, how.sampler))


def _crop(retrieval: Application, half: int) -> Application:
    return replace(retrieval, region=retrieval.region.chunk(2, -1)[half])


def _limit_to_half(retrieval: Application, half: int) -> Application:
    region = torch.zeros(SIZE, 2 * SIZE)
    region.chunk(2, -1)[half].fill_(1)
    return replace(retrieval, region=region)


LINES = {
    "token budget": measure_budgets,
    "query pooling": measure_pooling,
    "masks": measure_masks,
    "regions": measure_regions,
}


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("measure_controls", 200)
    parser.add_argument("--only", choices=LINES, nargs="+", default=list(LINES))
    options = parser.parse_args(arguments)

    def measure() -> dict[str, Any]:
        bundle = load_bundle(options.weights)
        result: dict[str, Any] = {"figures": options.count, "seed": options.seed}
        for name in options.only:
            result[name] = LINES[name](bundle, options.count, options.seed, Sampling())
        return result

    return print_result(options, measure)


if __name__ == "__main__":
    sys.exit(main())
