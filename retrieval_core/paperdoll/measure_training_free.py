"""Measures the training-free mode on held-out paper-doll characters: see `main` for the command.

The first line is the base model without retrieval, each further one a setting, all from the same
prompts and noise. The judge classifies the pictures; numbers are percentages of figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

from torch import Tensor

from ..network.controlnet import GUIDANCES, Guidance
from ..sampling.presets import BALANCED, PRESETS, Preset
from ..training_free.attention_layers import NO_LAYERS
from ..training_free.training_free_network import LAYERS, LEVELS, TrainingFree
from .bundle import BASE_FILE, JUDGE_FILE, find_bundled
from .cases import Case, make_character_case, make_composition_case
from .generate import Sampling, apply_training_free, sample_pictures
from .judge import load_judge
from .measure import (
    compute_chance_levels,
    draw_in_batches,
    make_parser,
    measure_following,
    measure_leak,
    measure_matches,
    print_result,
)
from .model import PaperdollModel, load_base

TASKS = {"same character": make_character_case, "composition": make_composition_case}


def generate_pictures(
    base: PaperdollModel,
    cases: Sequence[Case],
    noise: Tensor,
    how: Sampling,
    network: TrainingFree | None = None,
    strength: float = 1.0,
    guidance: Guidance = "cond",
    preset: Preset = PRESETS[BALANCED],
    references: int | None = None,
    least: float = 0.0,
) -> Tensor:
    """One picture per case, [B, 3, 64, 64] in 0..1, from unit noise; network None: no retrieval.

    Args:
        references: how many of each case's, the first ones; None for all.
        least: see `select_tokens`.
    """
    applied = []
    if network is not None:
        groups = [case.references[:references] for case in cases]
        applied.append(
            apply_training_free(
                base, network, groups, strength, guidance, preset=preset, least=least
            )
        )
    prompts = [case.prompt for case in cases]
    return sample_pictures(base, base.unet, prompts, noise, applied, how)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The measurement that the command line asks for, as one JSON-able dict."""
    base = load_base(find_bundled(BASE_FILE, options.weights))
    judge = load_judge(find_bundled(JUDGE_FILE, options.weights))
    masked, how = not options.unmasked, Sampling(options.steps, options.cfg)
    cases = [TASKS[options.task](options.seed, i, masked=masked) for i in range(options.count)]
    result: dict[str, Any] = {
        "figures": options.count,
        "seed": options.seed,
        "task": options.task,
        "references masked": masked,
        "chance": compute_chance_levels(),
    }

    def add_line(name: str, **setting: Any) -> None:
        draw = partial(generate_pictures, base, how=how, **setting)
        found = judge.read(draw_in_batches(base, options.seed, cases, draw, name))
        result[name] = {
            "attribute match": measure_matches(cases, found),
            "text followed": measure_following(cases, found),
            "reference background": measure_leak(cases, found),
        }

    add_line("without retrieval")
    layers = product(options.levels, options.layers, options.guidance)
    settings = product(options.preset, options.references, options.strength, layers)
    for preset, count, strength, (levels, chosen, guidance) in settings:
        network = TrainingFree(base.unet.config, "paperdoll", "", chosen, levels, options.adain)
        name = f"{preset}, {count} references, strength {strength:g}, noise levels {levels}"
        if chosen != NO_LAYERS:
            name += f", {chosen} layers attend, {guidance}" + ", AdaIN" * options.adain
        add_line(
            name,
            network=network,
            strength=strength,
            guidance=guidance,
            preset=PRESETS[preset],
            references=count,
        )
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("measure_training_free", 100)
    parser.add_argument("--task", choices=TASKS, default="same character")
    parser.add_argument("--preset", choices=PRESETS, nargs="+", default=[BALANCED])
    parser.add_argument("--references", type=int, choices=range(1, 5), nargs="+", default=[4])
    parser.add_argument("--levels", type=int, nargs="+", default=[LEVELS])
    parser.add_argument("--layers", nargs="+", default=[LAYERS])
    parser.add_argument("--strength", type=float, nargs="+", default=[1.0])
    parser.add_argument("--guidance", choices=GUIDANCES, nargs="+", default=["cond"])
    parser.add_argument("--adain", action="store_true")
    parser.add_argument("--unmasked", action="store_true", help="references with background")
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--cfg", type=float, default=Sampling.cfg)
    options = parser.parse_args(arguments)
    return print_result(options, lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
