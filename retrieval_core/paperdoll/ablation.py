"""`python -m retrieval_core.paperdoll.ablation RUN.toml`: the paper's ablation on paper dolls.

Each row of Tables 3 and 4 is a run of `train_from_data_set` with the settings of `run.toml` and its
own changes, all of the same number of steps; so are rows without a term that the file's settings
add to equation 1, and without all of them. Adapters of IP-Adapter's kind are trained by equation 1
on the same batches for the same time. Rows are measured on held-out characters: attribute match (in
place of CLIP-I), text following (CLIP-T) and diversity (the VQA score). The same command again goes
on.

With `--row NAME`, which may be repeated, only these rows are made, so that several processes can
share the work once the latents are cached. A GPU is used if there is one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from ..data.data_set import open_data_set
from ..errors import run_command
from ..files import read_safetensors, save_safetensors, write_text
from ..network.controlnet import load
from ..network.unet import load_strictly
from ..sampling.sampler import sample
from ..training.base_checkpoint import Base
from ..training.latent_cache import LatentCache, fill_cache, plan_cache
from ..training.objective import retrieval_loss
from ..training.paper_objective import HALF, draw_noise
from ..training.run_config import RunConfig, read_config
from ..training.settings import scale_learning_rate
from ..training.task_batches import Batch, make_loader
from ..training.training_run import make_objective, train
from .bundle import JUDGE_FILE, Bundle, find_bundled
from .cases import Case, drop_prompt, make_character_case, make_composition_case
from .ema import ExponentialMovingAverage
from .generate import Sampling
from .image_adapter import GRIDS, ImageAdapter
from .judge import Attributes, load_judge
from .measure import (
    SEEDS_EACH,
    draw_in_batches,
    measure_diversity,
    measure_following,
    measure_matches,
    read_figures,
)
from .model import PaperdollModel, load_base
from .train_from_data_set import make_base

COUNT, SEED = 100, 5  # figures of a measurement
MEASURES = ("match", "following", "diversity")
TASKS = {"recon": "same character", "compose": "composition"}
CHANGES: dict[str, dict[str, Any]] = {
    "": {},
    ", text drop 0.3": {"text_drop": 0.3},
    ", text drop 0.8": {"text_drop": 0.8},
    ", lock decoder": {"lock": "lock_decoder"},
    ", lock both": {"lock": "lock_both"},
}
ROWS: dict[str, dict[str, Any]] = {
    f"{name}{words}": {"task": task, "text_drop": 0.5, "references": 4, "lock": "train_both"}
    | changes
    for name, task in TASKS.items()
    for words, changes in CHANGES.items()
}
ROWS |= {f"recon, {n} references": ROWS["recon"] | {"references": n} for n in (1, 2)}
# What the dolls' settings add to the paper's objective, apart and together. The adapters have the
# paper's objective alone, too.
TERMS: dict[str, dict[str, Any]] = {
    "without correspondence": {"correspondence": 0.0},
    "without part weights": {"part_weight": 0.0},
    "without reconstruction": {"reconstruction": 0.0},
}
TERMS["equation 1 alone"] = {n: v for changes in TERMS.values() for n, v in changes.items()}
ROWS |= {f"recon, {words}": ROWS["recon"] | changes for words, changes in TERMS.items()}
# Tables 3 and 4: CLIP-I, CLIP-T and the average VQA score, in percent. The text drop of two rows of
# each task is lost in the text at hand; §5.4 says which way it moves both CLIP scores.
PAPER = {
    "recon": (71.54, 18.61, 34.30),
    "recon, text drop 0.3": (70.52, 19.18, 34.31),
    "recon, text drop 0.8": (72.90, 17.75, 34.90),
    "recon, lock decoder": (69.25, 18.50, 36.76),
    "recon, lock both": (67.59, 18.46, 37.51),
    "compose": (72.02, 18.48, 33.38),
    "compose, text drop 0.3": (69.55, 19.11, 31.51),
    "compose, text drop 0.8": (69.96, 18.89, 33.69),
    "compose, lock decoder": (69.65, 18.40, 36.60),
    "compose, lock both": (69.14, 18.80, 36.35),
}

Read = Callable[[Sequence[Case], str], list[Attributes]]


def list_rows() -> list[str]:
    """Names of all rows: the paper's, then the adapters."""
    return [*ROWS, *(f"adapter, {count} tokens" for count in GRIDS)]


def run_rows(config: RunConfig, names: Sequence[str]) -> dict[str, dict[str, float]] | None:
    """Trains and measures rows in `config.out`; None if interrupted.

    Writes the figures of a row to a file named after it, and reads them where there is one.
    """
    rows = {}
    for name in names:
        folder = config.out / name.replace(", ", "-").replace(" ", "-")
        path = folder.with_name(f"{folder.name}.json")
        if not path.is_file():
            measured = make_row(config, name, folder)
            if measured is None:
                return None
            write_text(path, json.dumps(measured, indent=2) + "\n")
        rows[name] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def make_row(config: RunConfig, name: str, folder: Path) -> dict[str, float] | None:
    """Trains a row of `list_rows` in a folder and measures it; None if interrupted."""
    if name in ROWS:
        row = replace(config, out=folder, **ROWS[name])
        trained = train(row, make_base(config.base))
        if trained is None:
            return None
        return measure_row(make_network_reader(config.base, trained), row.task)
    settings = replace(config, **ROWS["recon"])
    (count,) = [count for count in GRIDS if name == f"adapter, {count} tokens"]
    adapter, steps = prepare_adapter(settings, count)
    measured = measure_row(make_adapter_reader(config.base, adapter), settings.task)
    return measured | {"steps": steps}


def choose_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure_row(read: Read, task: str) -> dict[str, float]:
    """Match and text following on held-out characters, diversity with an empty prompt; percent."""
    make = make_character_case if task == "same character" else make_composition_case
    cases = [make(SEED, i) for i in range(COUNT)]
    found = read(cases, "match")
    open_ended = [drop_prompt(cases[i // SEEDS_EACH]) for i in range(COUNT)]
    varied = measure_diversity(read(open_ended, "diversity"), SEEDS_EACH)
    return {
        "match": measure_matches(cases, found)["mean"],
        "following": round(mean(measure_following(cases, found).values()), 2),
        "diversity": round(mean(varied.values()), 2),
    }


def make_network_reader(base: Path, network: Path) -> Read:
    """Reads figures that a trained network's file gives."""
    device, judge = choose_device(), load_judge(find_bundled(JUDGE_FILE))
    trained = load(network, "paperdoll", dtype=torch.float32, device=device)
    trained = trained.eval().requires_grad_(False)
    bundle = Bundle(load_base(base).to(device), trained, judge)
    return lambda cases, title: read_figures(bundle, Sampling(), SEED, cases, title)


def make_adapter_reader(base: Path, adapter: ImageAdapter) -> Read:
    """Reads figures that an adapter gives."""
    model, judge = load_base(base).to(choose_device()), load_judge(find_bundled(JUDGE_FILE))
    adapter = adapter.to(model.device)

    def draw(batch: Sequence[Case], noise: Tensor) -> Tensor:
        return draw_with_adapter(model, adapter, batch, noise, Sampling())

    return lambda cases, title: judge.read(draw_in_batches(model, SEED, cases, draw, title))


@torch.inference_mode()
def draw_with_adapter(
    base: PaperdollModel,
    adapter: ImageAdapter,
    cases: Sequence[Case],
    noise: Tensor,
    how: Sampling,
) -> Tensor:
    """Pictures [B, 3, 64, 64] of cases; only conditional rows see the image tokens.

    Base and adapter are on one device, noise and pictures on the CPU.
    """
    unet, schedule, count, device = base.unet, base.schedule, len(cases), base.device
    shown = [reference for case in cases for reference in case.references]
    latents = base.vae.encode(torch.stack([reference.image for reference in shown]).to(device))
    concepts = base.text.encode([reference.concept for reference in shown])
    used = torch.ones(count, len(shown) // count, dtype=torch.bool, device=device)
    tokens = adapter.embed(unet, latents, concepts, used)
    cond, uncond = base.text.encode([c.prompt for c in cases]), base.text.encode([""] * count)

    def denoise(x: Tensor, timestep: int) -> Tensor:
        sigma = schedule.sigmas()[timestep]
        at = torch.full((count,), timestep, device=device)
        scaled = x / (1 + sigma**2).sqrt()
        with adapter.attached(unet, tokens):
            positive = unet(scaled, at, cond)
        negative = unet(scaled, at, uncond)
        prediction = negative + how.cfg * (positive - negative)
        return schedule.denoised(prediction, x, sigma.expand(count))

    latents = sample(denoise, noise.to(device), schedule, how.steps, how.sampler)
    return base.vae.decode(latents).cpu()


def prepare_adapter(config: RunConfig, count: int) -> tuple[ImageAdapter, int]:
    """Reads an adapter's file, or trains it for the time of the network's steps and writes it.

    Returns:
        The adapter, and the number of steps that it was trained for.
    """
    path = config.out / f"adapter-{count}.safetensors"
    base = make_base(config.base)
    adapter = ImageAdapter(base.unet, count)
    if path.is_file():
        tensors, metadata = read_safetensors(path)
        load_strictly(adapter, tensors, f"adapter '{path}'")
        return adapter, int(metadata["steps"])
    cache = plan_cache(open_data_set(config.data), base, config)
    fill_cache(cache, base)
    torch.manual_seed(config.seed)
    adapter = ImageAdapter(base.unet, count)
    seconds = [time_steps(config, cache, one) for one in (None, adapter)]
    steps = round(config.steps * seconds[0] / seconds[1])
    adapter, device = ImageAdapter(base.unet, count), choose_device()
    base.unet.to(device)
    trained = train_adapter(replace(config, steps=steps), base, cache, adapter.to(device))
    save_safetensors(path, trained, {"format": "paperdoll_adapter", "steps": str(steps)})
    load_strictly(adapter, trained, f"adapter '{path}'")
    return adapter, steps


def time_steps(config: RunConfig, cache: LatentCache, adapter: ImageAdapter | None) -> float:
    """Processor seconds of the forward and backward passes of 3 steps; None: of the network.

    On the CPU in any case, where other processes do not change what is measured.
    """
    config = replace(config, steps=4, warmup_steps=0)
    base = make_base(config.base)
    objective = make_objective(config, base) if adapter is None else None
    spent = []
    for batch in make_loader(cache, config):
        batch = batch.to("cpu", torch.float32)
        start = time.process_time()
        with _autocast(config, "cpu"):
            if objective is not None:
                loss = objective(batch, *_draw_noise(config, base, batch))["loss"]
            else:
                loss = measure_adapter_loss(config, base, adapter, batch)
        loss.backward()
        spent.append(time.process_time() - start)
    return sum(spent[1:])  # the first one sets things up


def train_adapter(
    config: RunConfig, base: Base, cache: LatentCache, adapter: ImageAdapter
) -> Mapping[str, Tensor]:
    """Trains an adapter with the paper's objective; its averaged weights."""
    parameters, device = dict(adapter.named_parameters()), adapter.norm.weight.device
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=config.weight_decay)
    average = ExponentialMovingAverage(parameters, config.ema_decay or 0.0)
    for step, batch in enumerate(make_loader(cache, config)):
        rate = scale_learning_rate(step, config.steps, config.warmup_steps)
        optimizer.param_groups[0]["lr"] = config.learning_rate * rate
        batch = batch.to(device, torch.float32)
        with _autocast(config, device.type):
            loss = measure_adapter_loss(config, base, adapter, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm)
        optimizer.step()
        average.update()
    return average.averages


def measure_adapter_loss(
    config: RunConfig, base: Base, adapter: ImageAdapter, batch: Batch
) -> Tensor:
    """Equation 1 of a batch, predicted by the frozen base with image tokens."""
    unet, schedule = base.unet, base.schedule
    timesteps, noise = _draw_noise(config, base, batch)
    latents, concepts = batch.reference_latents, batch.reference_context
    tokens = adapter.embed(unet, latents.flatten(0, 1), concepts.flatten(0, 1), batch.used)
    tokens = tokens.repeat_interleave(config.targets, 0)
    with adapter.attached(unet, tokens):
        noised = schedule.noised(batch.latents, noise, timesteps)
        prediction = unet(noised, timesteps, batch.context).float()
    target = schedule.target(batch.latents, noise, timesteps)
    losses = retrieval_loss(
        prediction, target, batch.content, batch.face, config.face_weight, base.channel_weights
    )
    return losses["loss"]


def _draw_noise(config: RunConfig, base: Base, batch: Batch) -> tuple[Tensor, Tensor]:
    timesteps, noise = draw_noise(
        config.seed, batch.numbers, batch.latents.shape[1:], base.schedule.steps, 0.0,
        config.noise_power,
    )  # fmt: skip
    return timesteps.to(batch.latents.device), noise.to(batch.latents.device)


def _autocast(config: RunConfig, device: str) -> torch.autocast:
    return torch.autocast(device, HALF.get(config.precision), config.precision in HALF)


def compare_orders(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for each task and measure: in how many pairs of rows our order is the paper's.

    It names the pairs of the other order, the row that the paper has higher first.
    """
    lines = []
    for task in TASKS:
        names = [name for name in PAPER if name.startswith(task)]
        for index, measure in enumerate(MEASURES):
            pairs = [
                (a, b) if PAPER[a][index] > PAPER[b][index] else (b, a)
                for a, b in combinations(names, 2)
            ]
            other = [(a, b) for a, b in pairs if rows[a][measure] <= rows[b][measure]]
            agree = len(pairs) - len(other)
            line = f"{task}, {measure}: {agree} of {len(pairs)} pairs as in the paper"
            if other:
                line += "; not " + "; ".join(f"{a} > {b}" for a, b in other)
            lines.append(line)
    return lines


def describe_rows(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The rows as a table, the paper's CLIP-I, CLIP-T and VQA scores beside."""
    lines = [f"{'':30}{'match':>8}{'follows':>9}{'diverse':>9}{'CLIP-I':>9}{'CLIP-T':>8}{'VQA':>8}"]
    for name, row in rows.items():
        ours = "".join(f"{row[m]:{w}.1f}" for m, w in zip(MEASURES, (8, 9, 9)))
        theirs = "".join(f"{v:{w}.2f}" for v, w in zip(PAPER.get(name, ()), (9, 8, 8)))
        lines.append(f"{name:30}{ours}{theirs}")
    return lines


def main(given: Sequence[str] | None = None) -> int:
    """Returns the exit code: 130 if interrupted."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--row", action="append", choices=list_rows())
    options, settings = parser.parse_known_args(given)

    def work() -> int:
        rows = run_rows(read_config(settings), options.row or list_rows())
        if rows is None:
            return 130
        lines = describe_rows(rows)
        if options.row is None:
            lines += ["", *compare_orders(rows)]
        print("\n".join(lines))
        return 0

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
