"""`python -m retrieval_core.paperdoll.train_from_data_set run.toml`: the training of real bases
(`retrieval_core.training`) on the paper-doll base and a data set on disk.

`base` is the base model's file. Make the data set with `python -m retrieval_core.paperdoll.booru
--disjoint --annotated 1` and `python -m retrieval_core.data build`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import run_command
from ..training.base_checkpoint import Base
from ..training.run_config import read_config
from ..training.training_run import train
from .model import PaperdollModel, load_base
from .text import LENGTH, split_tags
from .train import weigh_channels
from .vae import PatchVAE


class DollCodec:
    """The paper dolls' VAE as a `LatentCodec`, whose pixels are in -1..1."""

    def __init__(self, vae: PatchVAE) -> None:
        self.vae = vae

    def encode(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels.to(self.vae.mean) / 2 + 0.5)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents) * 2 - 1

    def to(self, *args: Any, **kw: Any) -> DollCodec:
        self.vae.to(*args, **kw)
        return self


class DollPrompts:
    """The paper dolls' text encoder as a `PromptEncoder`.

    Of a picture's tags it takes those that it knows: a booru tags hair and clothes, too.
    """

    def __init__(self, model: PaperdollModel) -> None:
        self.text = model.text

    @torch.no_grad()
    def encode(self, texts: Sequence[str], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, None]:
        known = self.text.tokenizer.ids
        tags = [[tag for tag in split_tags(text) if tag in known][:LENGTH] for text in texts]
        return self.text.encode([", ".join(one) for one in tags]), None

    def to(self, *args: Any, **kw: Any) -> DollPrompts:
        self.text.to(*args, **kw)
        return self


def make_base(path: Path) -> Base:
    """The paper-doll base as training takes it; RetrievalError if the file is not one."""
    model = load_base(path)
    return Base(
        unet=model.unet,
        vae=DollCodec(model.vae),
        prompts=DollPrompts(model),
        schedule=model.schedule,
        name="paperdoll",
        fingerprint=hashlib.sha256(path.read_bytes()).hexdigest(),
        channel_weights=weigh_channels(model.vae),
    )


def main(given: Sequence[str] | None = None) -> int:
    """Returns the exit code: 130 of an interrupted run."""

    def work() -> int:
        config = read_config(given)
        return 130 if train(config, make_base(config.base)) is None else 0

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
