"""Trains the bundled paper-doll weights from a seed: `python -m retrieval_core.paperdoll.train`.

Stages, each resumable: `base` (U-Net and text encoder), `retrieval` (the network of the paper on
that base), `refine` (the same further, told the references' attributes), `judge` (the attribute
measurement). Without --stage all run in that order.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..controlnet import RetrievalControlNet, load
from ..errors import RetrievalError
from ..training.attributes import AttributeReader, deeper_sites
from ..training.joint import TrainableRetrieval
from ..training.settings import LOCKS, Lock, TrainingSettings
from ..training.trainer import Trainer
from .bundle import BASE_FILE, JUDGE_FILE, RETRIEVAL_FILE
from .data import (
    READ,
    BaseBatches,
    RetrievalBatch,
    RetrievalBatches,
    render_any,
    render_characters,
    to_images,
)
from .draw import PARTS
from .judge import ATTRIBUTES, Judge, load_judge, truth_ids
from .model import PaperdollModel, load_base
from .vae import PatchVAE

STAGES = ("base", "retrieval", "refine", "judge")
CHARACTERS = 3000
CORRESPONDENCE = 0.2
NOISE_POWER = 0.6
# The network's encoder and the decoder start as copies of trained layers.
RATE_FACTORS = {"network.encoder.": 0.3, "unet.": 0.3}
REFINE_RATE_FACTORS = {"network.encoder.": 0.5, "unet.": 0.5}
READING = 0.3  # weight of the attribute loss while refining
FIRST_FILE = "paperdoll_retrieval_first.safetensors"
BACKGROUND = 0.3  # what the loss counts there, beside 1 on the figure


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
        self,
        base: PaperdollModel,
        network: RetrievalControlNet,
        lock: Lock,
        face_weight: float,
        correspondence: float,
        reading: float = 0.0,
    ) -> None:
        reader = None
        if reading:
            widths = network.config.site_channels()
            widths = {site: widths[site] for site in deeper_sites(list(widths))}
            sizes = {name: (part, len(ATTRIBUTES[name])) for name, part in READ.items()}
            reader = AttributeReader(widths, sizes)
        # An error counts by what it changes in pixels, tempered: details are to be learnt, too.
        weights = 1 / base.vae.scale
        super().__init__(
            network,
            base.unet,
            base.schedule,
            lock,
            face_weight,
            correspondence,
            weights / weights.mean(),
            NOISE_POWER,
            reader,
            reading,
        )
        self.frozen = [base.text, base.vae]

    def batch_loss(self, batch: RetrievalBatch, generator: torch.Generator) -> dict[str, Tensor]:
        text, vae = self.frozen
        with torch.no_grad():
            context, reference_context = text(batch.ids), text(batch.reference_ids)
            latents, references = vae.encode(batch.targets), vae.encode(batch.references)
        bank = self.bank(references, reference_context, batch.used, batch.masks)
        parts = (batch.target_parts, batch.reference_parts, PARTS)
        content = torch.where(batch.target_parts > 0, 1.0, BACKGROUND)
        return self.loss(
            bank,
            latents,
            context,
            generator,
            content,
            batch.face,
            parts=parts,
            attributes=batch.truths,
        )


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


@dataclass(frozen=True)
class RetrievalOptions:
    """What `train_retrieval` and `refine` share beside the settings; see `TrainableRetrieval`."""

    characters: int = CHARACTERS
    lock: Lock = "train_both"
    text_drop: float = 0.3
    face_weight: float = 1.0
    correspondence: float = CORRESPONDENCE


def train_retrieval(
    out: Path,
    settings: TrainingSettings,
    base: PaperdollModel,
    options: RetrievalOptions,
    until: int | None = None,
) -> RetrievalControlNet:
    """Trains the retrieval network on a trained base to step `until`; returns it as saved."""
    network = RetrievalControlNet.from_base(
        base.unet.state_dict(), "paperdoll", settings.seed, config=base.unet.config
    )
    return _train_network(out, "retrieval", settings, base, network, options, until)


def refine(
    out: Path, settings: TrainingSettings, base: PaperdollModel, options: RetrievalOptions
) -> RetrievalControlNet:
    """Trains the network of `train_retrieval` further, with the attribute loss."""
    network = load(out / FIRST_FILE, "paperdoll", dtype=torch.float32)
    return _train_network(out, "refine", settings, base, network, options)


def _train_network(
    out: Path,
    stage: str,
    settings: TrainingSettings,
    base: PaperdollModel,
    network: RetrievalControlNet,
    options: RetrievalOptions,
    until: int | None = None,
) -> RetrievalControlNet:
    refining = stage == "refine"
    data = render_characters(settings.seed, options.characters)
    torch.manual_seed(settings.seed)
    owner = PaperdollRetrieval(
        _with_decoder(base, network),
        network,
        options.lock,
        options.face_weight,
        options.correspondence,
        READING if refining else 0.0,
    )
    owner.to(memory_format=torch.channels_last)  # faster on CPUs
    description = {
        "stage": stage,
        **asdict(options),
        "noise_power": NOISE_POWER,
        "background": BACKGROUND,
        **({"reading": READING} if refining else {}),
    }
    # Other batches than those that the first stage has seen.
    seed = settings.seed + 1_000_000 * refining
    trainer = Trainer(
        owner,
        owner.batch_loss,
        RetrievalBatches(data, settings.batch_size, seed, text_drop=options.text_drop),
        settings,
        out / stage,
        description=description,
        prefetch=2,
        label=stage,
        rate_factors=REFINE_RATE_FACTORS if refining else RATE_FACTORS,
    )
    _finish(trainer, until)
    finished = owner.finished(trainer.ema_state_dict())
    finished.card.training.clear()
    finished.card.training.update(description, **settings.as_json())
    finished.save(out / (RETRIEVAL_FILE if refining else FIRST_FILE), torch.float16)
    return finished


def _with_decoder(base: PaperdollModel, network: RetrievalControlNet) -> PaperdollModel:
    """The base model with the network's trained decoder, if it has one; the base is not touched."""
    shown = copy.copy(base)
    shown._modules = dict(base._modules)
    shown.unet = network.apply_decoder(base.unet)
    return shown


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


def _finish(trainer: Trainer, until: int | None = None) -> None:
    """Runs the trainer to step `until` or its end; interrupted, it raises KeyboardInterrupt."""
    result = trainer.run(until)
    print(result.message, flush=True)
    if result.interrupted:
        raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m retrieval_core.paperdoll.train")
    parser.add_argument("--out", type=Path, default=Path("output/paperdoll"))
    parser.add_argument("--stage", choices=STAGES, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--characters", type=int, default=CHARACTERS)
    parser.add_argument("--base-steps", type=int, default=3600)
    parser.add_argument("--base-batch", type=int, default=32)
    parser.add_argument("--base-rate", type=float, default=1e-3)
    parser.add_argument("--retrieval-steps", type=int, default=3400)
    parser.add_argument("--retrieval-batch", type=int, default=8, help="characters a step")
    parser.add_argument("--retrieval-rate", type=float, default=1.2e-3)
    parser.add_argument(
        "--retrieval-until", type=int, default=2500, help="the first stage stops there, unannealed"
    )
    parser.add_argument("--refine-steps", type=int, default=1750)
    parser.add_argument("--refine-rate", type=float, default=1.2e-3)
    parser.add_argument("--judge-steps", type=int, default=2500)
    parser.add_argument("--judge-figures", type=int, default=40000)
    parser.add_argument("--lock", choices=LOCKS, default="train_both")
    parser.add_argument("--text-drop", type=float, default=0.3, help="the paper: 0.5")
    parser.add_argument("--face-weight", type=float, default=1.0)
    parser.add_argument("--correspondence", type=float, default=CORRESPONDENCE)
    parser.add_argument("--threads", type=int, default=2, help="rounding depends on it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    stages = options.stage or list(STAGES)

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
        shared = RetrievalOptions(
            options.characters,
            options.lock,
            options.text_drop,
            options.face_weight,
            options.correspondence,
        )
        if "retrieval" in stages:
            train_retrieval(
                options.out,
                settings(options.retrieval_steps, options.retrieval_batch, options.retrieval_rate),
                load_base(options.out / BASE_FILE),
                shared,
                min(options.retrieval_until, options.retrieval_steps),
            )
        if "refine" in stages:
            refine(
                options.out,
                settings(options.refine_steps, options.retrieval_batch, options.refine_rate),
                load_base(options.out / BASE_FILE),
                shared,
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
