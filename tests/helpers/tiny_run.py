"""A tiny training run on disk; as a script it is what tests start, interrupt and kill."""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from cached_data_set import AverageVae, FakeBase, configure, write_pictures

from retrieval_core.errors import RetrievalError
from retrieval_core.network.unet import UNet, UNetConfig
from retrieval_core.sampling.noise_schedule import NoiseSchedule
from retrieval_core.training import training_run

CONFIG = UNetConfig(32, (1, 2), (1, 1), (0, 1), 1, 8, num_head_channels=16)


class Movable:
    def to(self, device):
        return self


class TinyVae(AverageVae, Movable):
    def decode(self, latents):
        return F.interpolate(latents[:, :3], scale_factor=8.0)


class TinyBase(FakeBase):
    """A random U-Net on 8 x 8 latents, for the data set of `write_pictures`."""

    def __init__(self, prediction="eps", in_channels=4):
        super().__init__()
        self.vae, self.prompts = TinyVae(), Movable()
        self.schedule = NoiseSchedule(prediction=prediction)
        torch.manual_seed(1)
        shape = UNetConfig(**{**vars(CONFIG), "in_channels": in_channels})
        self.unet = UNet(shape).eval().requires_grad_(False)

    def encode_prompts(self, texts, sizes):
        context, y = super().encode_prompts(texts, sizes)
        return context / 128 - 1, y


def set_up(folder, **changes):
    """Writes the data set if it is not there; the configuration of a run of 12 steps."""
    if not (folder / "set").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_pictures(folder)
    values = {
        "steps": 12,
        "learning_rate": 1e-3,
        "precision": "float32",
        "token_budget": 24,
        "query_pooling": 2,
        "checkpoint_every": 3,
        "sheet_every": None,
        "noise_offset": 0.05,
        "text_drop": 0.3,
        "references": 2,
    }
    return configure(folder, **{**values, **changes})


def train(config, base=None):
    """The tensors of the last checkpoint of a run."""
    training_run.train(config, base or TinyBase())
    return read_checkpoint(config)


def read_checkpoint(config):
    folder = training_run.RunFolder(config.out, config.keep_checkpoints)
    tensors, state = folder.load_newest()
    return tensors, state


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, delay = Path(sys.argv[1]), float(sys.argv[2])
    config = set_up(folder, **json.loads(sys.argv[3]))
    if delay:  # between steps
        # One write a line: torchrun starts Python with -u, and two processes share the pipe.
        print(f"process {os.getpid()}\n", end="", flush=True)
        update = training_run.CpuAverage.update

        def slow(self, step, is_last):
            time.sleep(delay)
            print(f"step {step}\n", end="", flush=True)
            update(self, step, is_last)

        training_run.CpuAverage.update = slow
    try:
        sys.exit(130 if training_run.train(config, TinyBase()) is None else 0)
    except RetrievalError as error:
        sys.exit(str(error))
