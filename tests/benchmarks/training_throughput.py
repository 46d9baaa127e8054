"""Throughput of the whole training loop over that of a plain loop on a batch in memory.

`python -m tests.benchmarks.training_throughput` trains a small U-Net on pictures of 256 pixels in
float32. The whole loop reads cached latents in worker processes, draws noise, logs, averages the
weights and saves a checkpoint; the plain one repeats forward pass, backward pass and AdamW's step.
Rounds alternate, so that a slow minute of the machine affects both.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from retrieval_core.data import open_data_set
from retrieval_core.network.unet import UNet, UNetConfig
from retrieval_core.sampling.noise_schedule import NoiseSchedule
from retrieval_core.training.paper_objective import draw_noise
from retrieval_core.training.run_config import RunConfig
from retrieval_core.training.task_batches import make_loader
from retrieval_core.training.terminal import Terminal
from retrieval_core.training.training_run import (
    make_objective,
    make_optimizer,
    order_parameters,
    plan_cache,
    train,
)
from tests.helpers.cached_data_set import AverageVae, FakeBase, configure, write_pictures

UNET = UNetConfig(64, (1, 2, 4), (1, 1, 1), (0, 1, 1), 1, 8, num_head_channels=32)
SIZE, BATCH, SKIPPED = 256, 4, 3  # the first steps warm up
ROWS = [(f"c{n // 8}", "bob", 0, True, True) for n in range(64)]


class Vae(AverageVae):
    def to(self, device: object) -> None:
        """It has no weights."""


class Base(FakeBase):
    """A random U-Net with the text encoder and the VAE of the tests."""

    schedule = NoiseSchedule()

    def __init__(self) -> None:
        super().__init__()
        self.vae = self.prompts = Vae()
        torch.manual_seed(0)
        self.unet = UNet(UNET).eval().requires_grad_(False)


class Clock(Terminal):
    """Notes the time of each step."""

    def __init__(self) -> None:
        super().__init__("throughput", False)
        self.times: list[float] = []

    @contextmanager
    def follow(self, step: int, steps: int) -> Iterator[None]:
        with super().follow(step, steps):
            yield
            self.times.append(time.perf_counter())  # of the last step, its checkpoint included

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        self.times.append(time.perf_counter())


def measure_loop(config: RunConfig) -> float:
    """Seconds a step of the whole loop after the first `SKIPPED`, its one checkpoint included."""
    clock = Clock()
    train(config, Base(), watcher=clock)
    return (clock.times[-1] - clock.times[SKIPPED - 1]) / (config.steps - SKIPPED)


def measure_plain(config: RunConfig) -> float:
    """Seconds a step of forward pass, backward pass and optimiser on one batch in memory."""
    base = Base()
    objective = make_objective(config, base)
    parameters = order_parameters(objective)
    optimizer = make_optimizer(parameters, config, 1)
    cache = plan_cache(open_data_set(config.data), base, config)
    batch = next(iter(make_loader(cache, replace(config, workers=0)))).to("cpu", torch.float32)
    timesteps, noise = draw_noise(0, batch.numbers, batch.latents.shape[1:], 1000, 0.0)
    started = 0.0
    for step in range(config.steps):
        if step == SKIPPED:
            started = time.perf_counter()
        objective(batch, timesteps, noise)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - started) / (config.steps - SKIPPED)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="processes that read batches")
    options = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder, ROWS)
        config = configure(
            folder,
            size=SIZE,
            batch_size=BATCH,
            references=2,
            steps=options.steps,
            workers=options.workers,
            precision="float32",
            sheet_every=None,
            task="same character",
            reference_drop=0.0,
        )
        train(replace(config, steps=1, out=folder / "first"), Base())  # fills the cache
        pairs = []
        for turn in range(options.rounds):
            if turn % 2:
                plain = measure_plain(config)
            whole = measure_loop(replace(config, out=folder / f"run-{turn}"))
            if not turn % 2:
                plain = measure_plain(config)
            pairs.append((plain, whole))
            print(f"plain {plain:.4f} s/step, whole loop {whole:.4f} s/step", flush=True)
    ratios = [plain / whole for plain, whole in pairs]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads: throughput of the whole "
        f"loop over the plain one {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
