"""Trains the bundled paper-doll weights from a seed: `python -m retrieval_core.paperdoll.train`.

Stages, each resumable: `base` (U-Net and text encoder), `retrieval` (the network of the paper on
that base), `judge` (the attribute measurement). Without --stage all three run in that order.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..controlnet import RetrievalControlNet
from ..errors import RetrievalError
from ..schedule import NoiseSchedule
from ..training.joint import TrainableRetrieval
from ..training.settings import LOCKS, TrainingSettings
from ..training.trainer import Trainer
from .bundle import BASE_FILE, JUDGE_FILE, RETRIEVAL_FILE
from .data import (
    BaseBatches,
    RetrievalBatch,
    RetrievalBatches,
    render_any,
    render_characters,
    to_images,
)
from .judge import Judge, load_judge, truth_ids
from .model import PaperdollModel, load_base
from .vae import PatchVAE

CHARACTERS = 3000


class BaseTraining(nn.Module):
    """The base model's diffusion loss on pictures and tags."""

    def __init__(self, model: PaperdollModel) -> None:
        super().__init__()
        self.unet, self.text = model.unet, model.text
        self.vae, self.schedule = [model.vae], model.schedule  # the VAE is fixed: not a child

    def loss(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        images, ids = batch
        latents = self.vae[0].encode(images)
        steps = torch.randint(self.schedule.steps, (len(ids),), generator=generator)
        eps = torch.randn(latents.shape, generator=generator)
        prediction = self.unet(self.schedule.noised(latents, eps, steps), steps, self.text(ids))
        return {"loss": (prediction - self.schedule.target(latents, eps, steps)).square().mean()}


class PaperdollRetrieval(TrainableRetrieval):
    """`TrainableRetrieval` fed with the world's batches through the base's text encoder and VAE."""

    def __init__(
        self, base: PaperdollModel, network: RetrievalControlNet, lock: str, face_weight: float
    ) -> None:
        schedule: NoiseSchedule = base.schedule
        super().__init__(network, base.unet, schedule, lock, face_weight)  # type: ignore[arg-type]
        self.frozen = [base.text, base.vae]

    def batch_loss(self, batch: RetrievalBatch, generator: torch.Generator) -> dict[str, Tensor]:
        text, vae = self.frozen
        with torch.no_grad():
            context, reference_context = text(batch.ids), text(batch.reference_ids)
            latents, references = vae.encode(batch.targets), vae.encode(batch.references)
        bank = self.bank(references, reference_context, batch.used, batch.masks)
        return self.loss(bank, latents, context, generator, face=batch.face)


def train_base(out: Path, settings: TrainingSettings, characters: int) -> PaperdollModel:
    """Trains and saves the base model; returns it with its averaged weights."""
    data = render_characters(settings.seed, characters)
    torch.manual_seed(settings.seed)
    model = PaperdollModel()
    model.initialise()
    model.vae = PatchVAE.fit(to_images(data.images[:200]), model.vae.channels)
    owner = BaseTraining(model).to(memory_format=torch.channels_last)  # faster on CPUs
    trainer = Trainer(
        owner,
        owner.loss,
        BaseBatches(data, settings.batch_size, settings.seed),
        settings,
        out / "base",
        description={"stage": "base", "characters": characters},
        prefetch=2,
        label="base",
    )
    _finish(trainer)
    with trainer.ema_weights():
        model.save(out / BASE_FILE, torch.float16)
    return load_base(out / BASE_FILE)


def train_retrieval(
    out: Path,
    settings: TrainingSettings,
    characters: int,
    base: PaperdollModel,
    lock: str = "train_both",
    text_drop: float = 0.5,
    face_weight: float = 1.0,
) -> RetrievalControlNet:
    """Trains and saves the retrieval network on a trained base; returns it as saved."""
    data = render_characters(settings.seed, characters)
    network = RetrievalControlNet.from_base(
        base.unet.state_dict(), "paperdoll", settings.seed, config=base.unet.config
    )
    owner = PaperdollRetrieval(base, network, lock, face_weight)
    owner.to(memory_format=torch.channels_last)  # faster on CPUs
    description = {
        "stage": "retrieval",
        "characters": characters,
        "lock": lock,
        "text_drop": text_drop,
        "face_weight": face_weight,
    }
    trainer = Trainer(
        owner,
        owner.batch_loss,
        RetrievalBatches(data, settings.batch_size, settings.seed, text_drop=text_drop),
        settings,
        out / "retrieval",
        description=description,
        prefetch=2,
        label="retrieval",
    )
    _finish(trainer)
    finished = owner.finished(trainer.ema_state_dict())
    finished.card.training.update(description, **settings.as_json())
    finished.save(out / RETRIEVAL_FILE, torch.float16)
    return finished


@dataclass(frozen=True)
class JudgeBatches:
    """Rendered figures and their true attributes; half of them as the VAE gives them back."""

    images: Tensor
    ids: Tensor
    vae: PatchVAE
    size: int
    seed: int

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, step, 2])
        which = torch.from_numpy(rng.integers(len(self.images), size=self.size))
        images = self.images[which].float() / 255
        half = self.size // 2
        decoded = self.vae.decode(self.vae.encode(images[:half]))
        return torch.cat([decoded, images[half:]]), self.ids[which]


def train_judge(out: Path, settings: TrainingSettings, figures: int, vae: PatchVAE) -> Judge:
    """Trains and saves the judge on figures of the whole world, held-out ones included."""
    drawn = render_any(settings.seed, figures)
    images = torch.from_numpy(np.stack([d.image for d in drawn])).movedim(-1, 1)
    ids = torch.tensor([truth_ids(d.figure) for d in drawn])
    torch.manual_seed(settings.seed)
    judge = Judge()
    trainer = Trainer(
        judge,
        judge.loss,
        JudgeBatches(images, ids, vae, settings.batch_size, settings.seed),
        settings,
        out / "judge",
        description={"stage": "judge", "figures": figures},
        prefetch=2,
        label="judge",
    )
    _finish(trainer)
    with trainer.ema_weights():
        judge.save(out / JUDGE_FILE)
    return load_judge(out / JUDGE_FILE)


def _finish(trainer: Trainer) -> None:
    """Runs the trainer to its end; an interruption leaves through KeyboardInterrupt."""
    result = trainer.run()
    print(result.message, flush=True)
    if result.interrupted:
        raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m retrieval_core.paperdoll.train")
    parser.add_argument("--out", type=Path, default=Path("output/paperdoll"))
    parser.add_argument("--stage", choices=("base", "retrieval", "judge"), action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--characters", type=int, default=CHARACTERS)
    parser.add_argument("--base-steps", type=int, default=3600)
    parser.add_argument("--base-batch", type=int, default=32)
    parser.add_argument("--base-rate", type=float, default=1e-3)
    parser.add_argument("--retrieval-steps", type=int, default=4000)
    parser.add_argument("--retrieval-batch", type=int, default=12, help="characters a step")
    parser.add_argument("--retrieval-rate", type=float, default=6e-4)
    parser.add_argument("--judge-steps", type=int, default=3000)
    parser.add_argument("--judge-figures", type=int, default=24000)
    parser.add_argument("--lock", choices=LOCKS, default="train_both")
    parser.add_argument("--text-drop", type=float, default=0.5)
    parser.add_argument("--face-weight", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2, help="rounding depends on it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    stages = options.stage or ["base", "retrieval", "judge"]

    def settings(steps: int, batch: int, rate: float) -> TrainingSettings:
        return TrainingSettings(
            steps=steps,
            batch_size=batch,
            learning_rate=rate,
            warmup_steps=min(100, steps // 10),
            weight_decay=0.01,
            betas=(0.9, 0.99),
            clip_norm=1.0,
            ema_decay=0.998,
            seed=options.seed,
            checkpoint_every=250,
        )

    try:
        if "base" in stages:
            train_base(
                options.out,
                settings(options.base_steps, options.base_batch, options.base_rate),
                options.characters,
            )
        if "retrieval" in stages:
            train_retrieval(
                options.out,
                settings(options.retrieval_steps, options.retrieval_batch, options.retrieval_rate),
                options.characters,
                load_base(options.out / BASE_FILE),
                options.lock,
                options.text_drop,
                options.face_weight,
            )
        if "judge" in stages:
            train_judge(
                options.out,
                settings(options.judge_steps, 128, 2e-3),
                options.judge_figures,
                load_base(options.out / BASE_FILE).vae,
            )
    except RetrievalError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps({"out": str(options.out), "stages": stages}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
