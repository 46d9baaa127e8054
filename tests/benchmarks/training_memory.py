"""Memory and steps per second of training SD 1.5 and SDXL on a GPU, beside the printed estimate.

`python -m tests.benchmarks.training_memory` trains networks of random weights on random latents, a
target with four references at a time, in bf16.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from retrieval_core.network.controlnet import Card, RetrievalControlNet
from retrieval_core.network.unet import UNet
from retrieval_core.sampling.noise_schedule import NoiseSchedule
from retrieval_core.training.memory_estimate import GIB, WORKSPACE, estimate_memory
from retrieval_core.training.paper_objective import PaperObjective, draw_noise
from retrieval_core.training.run_config import RunConfig
from retrieval_core.training.single_device import SingleDevice
from retrieval_core.training.task_batches import Batch
from retrieval_core.training.training_run import make_optimizer, order_parameters

from .hosting import BASES

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD 1.5, lock_decoder, 12 GB": ("sd15", {"lock": "lock_decoder"}),
    "SD 1.5, train_both, 24 GB": ("sd15", {}),
    "SD 1.5, train_both, 8 targets": ("sd15", {"batch_size": 8}),
    "SDXL, rank 16, 24 GB": ("sdxl", {"rank": 16}),
    "SDXL, train_both": ("sdxl", {}),
}
_WARMED = 3  # steps before the clock starts


def make_config(base: str, changes: dict[str, Any]) -> RunConfig:
    path, (_, _, size) = Path("unused"), BASES[base]
    settings = {"size": size, "batch_size": 1, "checkpoint_activations": True}
    return RunConfig(path, path, path, **settings | {"optimizer": "adamw-fused"} | changes)


def make_batch(config: RunConfig, base: str) -> Batch:
    """Random latents and texts."""
    _, unet, size = BASES[base]
    count, references, edge = config.batch_size, config.references, size // 8
    y = reference_y = None
    if unet.adm_in_channels is not None:
        y = torch.randn(count, unet.adm_in_channels)
        reference_y = torch.randn(count, references, unet.adm_in_channels)
    return Batch(
        latents=torch.randn(count, 4, edge, edge),
        content=torch.ones(count, 1, edge, edge),
        face=torch.zeros(count, 1, edge, edge),
        context=torch.randn(count, 77, unet.context_dim),
        y=y,
        reference_latents=torch.randn(count, references, 4, edge, edge),
        reference_context=torch.randn(count, references, 77, unet.context_dim),
        reference_y=reference_y,
        reference_masks=torch.ones(count, references, edge, edge, dtype=torch.bool),
        used=torch.ones(count, references, dtype=torch.bool),
        parts=None,
        reference_parts=None,
        numbers=torch.arange(count),
        names=[[]] * count,
    )


def measure(title: str, steps: int) -> str:
    """One line of figures; `steps` are timed."""
    base, changes = SETTINGS[title]
    config, shape = make_config(base, changes), BASES[base][1]
    estimate = estimate_memory(config, shape, base)
    device = SingleDevice(torch.device("cuda"), config)
    unet = UNet(shape, device="cuda").eval().requires_grad_(False)
    network = RetrievalControlNet(
        shape, Card(base), device="cuda", query_pooling=config.query_pooling
    )
    objective = PaperObjective(network, unet, NoiseSchedule(), config)
    parameters = order_parameters(objective)
    optimizer = make_optimizer(parameters, config, 1)
    model, stepping = device.prepare(objective, optimizer, None)
    batch = make_batch(config, base).to("cuda", torch.float32)
    noise = [t.to("cuda") for t in draw_noise(0, batch.numbers, batch.latents.shape[1:], 1000, 0.0)]
    torch.cuda.empty_cache()
    for step in range(_WARMED + steps):
        if step == _WARMED:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
        with device.accumulate(None):
            device.backward(model(batch, *noise)["loss"])
            device.clip_grad_norm_(parameters.values(), config.clip_norm)
            stepping.step()
            stepping.zero_grad()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / steps
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    expected = estimate.device - WORKSPACE
    return (
        f"{title}: {1 / seconds:.2f} steps/s; estimated {expected / GIB:.2f} GiB and "
        f"{WORKSPACE / GIB:.0f} of workspace, allocated {allocated / GIB:.2f} (estimate over it "
        f"{expected / allocated:.3f}), reserved {reserved / GIB:.2f}"
    )


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each setting")
    parser.add_argument("--only", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    options = parser.parse_args(given)
    if not torch.cuda.is_available():
        print("It needs an NVIDIA GPU, and torch sees none.", file=sys.stderr)
        return 2
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}", flush=True)
    for title in options.only:
        print(measure(title, options.steps), flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
