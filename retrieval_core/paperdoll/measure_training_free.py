"""Measures the training-free mode on held-out paper-doll characters: see `main` for the command.

Every line is one setting, generated from the same prompts and noise and read by the judge, beside
the base model without retrieval. Numbers are percentages of figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..bank.encoding import batch_features
from ..bank.site_bank import Bank, make_bank
from ..data.prepare import PreparedReference
from ..errors import RetrievalError
from ..network.controlnet import GUIDANCES
from ..sampling.sampler import make_guided_denoiser, sample
from ..training_free.attention_layers import name_layers
from ..training_free.joint_retrieval import JointRetrieval
from ..training_free.recording import record
from ..training_free.training_free_network import LAYERS, LEVELS, TrainingFree
from .bundle import BASE_FILE, JUDGE_FILE, find_bundled
from .cases import Case, list_references, make_character_case, make_composition_case
from .generate import stack_masks
from .judge import Judge, load_judge
from .measure import compute_chance_levels, measure_following, measure_leak, measure_matches
from .model import PaperdollModel, load_base

BATCH = 20
TASKS = {"same character": make_character_case, "composition": make_composition_case}


@dataclass(frozen=True)
class Setting:
    """One line of the measurement; None as `levels` is the base model without retrieval."""

    levels: int | None = LEVELS
    layers: str = LAYERS
    strength: float = 1.0
    guidance: str = "cond"
    adain: bool = False
    steps: int = 16
    cfg: float = 2.0

    @property
    def name(self) -> str:
        if self.levels is None:
            return "without retrieval"
        parts = [
            f"noise levels {self.levels}",
            self.layers,
            f"strength {self.strength:g}",
            self.guidance,
        ]
        return ", ".join(parts + (["AdaIN"] if self.adain else []))


def make_banks(
    base: PaperdollModel, network: TrainingFree, references: Sequence[Sequence[PreparedReference]]
) -> Bank:
    """Banks of equally many references each; masks count, weights do not."""
    flat = [reference for group in references for reference in group]
    used = torch.ones(len(references), len(references[0]), dtype=torch.bool)
    latents = base.vae.encode(torch.stack([reference.image for reference in flat]))
    context = base.text.encode([reference.concept for reference in flat])
    recorded = record(base.unet, base.schedule, network, latents, context)
    tokens = batch_features(recorded, latents.shape[2:], used, stack_masks(flat))
    return make_bank(tokens, None, network.site_downsampling())


def generate_pictures(
    base: PaperdollModel, cases: Sequence[Case], noise: Tensor, setting: Setting
) -> Tensor:
    """One picture a case, [B, 3, 64, 64] in 0..1, from unit noise."""
    with torch.inference_mode():
        applied = []
        if setting.levels is not None:
            network = TrainingFree(
                base.unet.config, "paperdoll", "", setting.layers, setting.levels, setting.adain
            )
            one = JointRetrieval(
                make_banks(base, network, list_references(cases)),
                setting.strength,
                guidance=setting.guidance,  # type: ignore[arg-type]
                names=name_layers(base.unet),
                timesteps=network.timesteps(),
                adain=network.adain,
            )
            applied.append(one)
        cond, uncond = (base.text.encode([c.prompt for c in cases]), base.text.encode([""]))
        uncond = uncond.expand(len(cases), -1, -1)
        denoise = make_guided_denoiser(base.unet, base.schedule, cond, uncond, setting.cfg, applied)
        latents = sample(denoise, noise, base.schedule, setting.steps)
        return base.vae.decode(latents)


def measure(
    base: PaperdollModel,
    judge: Judge,
    settings: Sequence[Setting],
    count: int,
    seed: int = 1,
    task: str = "same character",
    masked: bool = True,
) -> dict[str, dict]:
    """setting's name -> what the judge reads off `count` figures, one of each case.

    Raises:
        RetrievalError: fewer than one figure, or what `TrainingFree` refuses.
    """
    if count < 1:
        raise RetrievalError(f"Measuring {count} figures is not possible; give 1 or more.")
    cases = [TASKS[task](seed, i, masked=masked) for i in range(count)]
    results: dict[str, dict] = {}
    for setting in settings:
        readings = []
        for start in range(0, count, BATCH):
            part = cases[start : start + BATCH]
            seeds = (seed * 1_000_003 + start + i for i in range(len(part)))
            noise = [base.noise(1, torch.Generator().manual_seed(each)) for each in seeds]
            readings += judge.read(generate_pictures(base, part, torch.cat(noise), setting))
        results[setting.name] = {
            "attribute match": measure_matches(cases, readings),
            "text followed": measure_following(cases, readings),
            "reference background": measure_leak(cases, readings),
        }
    return results


def main(arguments: list[str] | None = None) -> int:
    name = "python -m retrieval_core.paperdoll.measure_training_free"
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("--count", type=int, default=100, help="figures a line")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other characters")
    parser.add_argument("--task", choices=TASKS, default="same character")
    parser.add_argument("--levels", type=int, nargs="+", default=[LEVELS])
    parser.add_argument("--layers", nargs="+", default=[LAYERS])
    parser.add_argument("--strength", type=float, nargs="+", default=[1.0])
    parser.add_argument("--guidance", choices=GUIDANCES, nargs="+", default=["cond"])
    parser.add_argument("--adain", action="store_true")
    parser.add_argument("--unmasked", action="store_true", help="references with background")
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--cfg", type=float, default=Setting.cfg)
    parser.add_argument("--weights", type=Path, help="folder of the weights, default: bundled")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    options = parser.parse_args(arguments)
    how = {"steps": options.steps, "cfg": options.cfg}
    settings = [Setting(None, **how)]
    settings += [
        Setting(levels, layers, strength, guidance, options.adain, **how)
        for levels in options.levels
        for layers in options.layers
        for strength in options.strength
        for guidance in options.guidance
    ]
    try:
        base = load_base(find_bundled(BASE_FILE, options.weights))
        judge = load_judge(find_bundled(JUDGE_FILE, options.weights))
        lines = measure(
            base, judge, settings, options.count, options.seed, options.task, not options.unmasked
        )
    except RetrievalError as error:
        print(error, file=sys.stderr)
        return 2
    result = {
        "figures": options.count,
        "seed": options.seed,
        "task": options.task,
        "references masked": not options.unmasked,
        "chance": compute_chance_levels(),
        **lines,
    }
    print(json.dumps(result, indent=None if options.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
