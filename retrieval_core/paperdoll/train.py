"""Trains the bundled paper-doll weights from a seed: `python -m retrieval_core.paperdoll.train`.

Stages, each resumable: `base` (U-Net and text encoder), `critic` (learns to read attributes off
latents), `retrieval` (the network of the paper on that base, what it draws read by the critic),
`pairs` (both go on, every other batch with two characters in a picture twice as wide; its files are
what is bundled), `judge` (the attribute measurement). Without --stage all run in that order.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import RetrievalError
from ..files import read_safetensors, save_safetensors
from ..network.controlnet import RetrievalControlNet, load
from ..network.unet import load_strictly
from ..training.critic import Critic
from ..training.settings import LOCKS, PRECISIONS, Precision, TrainingSettings
from ..training.trainer import Trainer
from .batches import (
    BaseBatches,
    CriticBatches,
    RetrievalBatches,
    render_any,
    render_characters,
    to_images,
)
from .bundle import BASE_FILE, JUDGE_FILE, RETRIEVAL_FILE
from .judge import Judge, index_truth, load_judge
from .model import PaperdollModel, load_base
from .trainees import (
    BACKGROUND,
    CHARACTERS,
    CORRESPONDENCE,
    DRAWING,
    NOISE_POWER,
    READING,
    BaseTraining,
    CriticTraining,
    PaperdollRetrieval,
    RetrievalOptions,
    make_critic,
    make_norms_contiguous,
)
from .vae import PatchVAE

STAGES = ("base", "critic", "retrieval", "pairs", "judge")
PAIRS = "pairs"  # the folder of that stage's files
# The network's encoder and the decoder start as copies of trained layers.
RATE_FACTORS = {"network.encoder.": 0.5, "unet.": 0.7}
CRITIC_FILE = "paperdoll_critic.safetensors"
CRITIC_FORMAT = "paperdoll_critic"


def train_base(
    out: Path, settings: TrainingSettings, characters: int, start: Path | None = None
) -> PaperdollModel:
    """Trains and saves the base model; returns it with its averaged weights.

    Args:
        start: a folder with a trained one, to go on from with pairs; None: from scratch.
    """
    data = render_characters(settings.seed, characters)
    torch.manual_seed(settings.seed)
    if start is None:
        model = PaperdollModel()
        model.initialise()
        model.vae = PatchVAE.fit(to_images(data.images[:200]), model.vae.channels)
    else:
        model = load_base(start / BASE_FILE)
        model.unet.requires_grad_(True)
        model.text.requires_grad_(True)
    owner = make_norms_contiguous(BaseTraining(model))
    trainer = Trainer(
        owner,
        owner.loss,
        BaseBatches(data, settings.batch_size, settings.seed, pairs=start is not None),
        settings,
        out / "base",
        description={"stage": "base", "pairs": start is not None, "characters": characters},
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
    base: PaperdollModel,
    options: RetrievalOptions,
    start: Path | None = None,
) -> RetrievalControlNet:
    """Trains a network on a trained base; returns it as saved.

    Args:
        start: a folder with a trained one, to go on from with pairs; None: a fresh one.
    """
    data = render_characters(settings.seed, options.characters)
    if start is None:
        network = RetrievalControlNet.from_base(
            base.unet.state_dict(), "paperdoll", settings.seed, config=base.unet.config
        )
    else:
        network = load(start / RETRIEVAL_FILE, "paperdoll", dtype=torch.float32)
    torch.manual_seed(settings.seed)
    critic = None
    if options.drawing:
        critic = make_norms_contiguous(load_critic((start or out) / CRITIC_FILE, base))
    owner = make_norms_contiguous(PaperdollRetrieval(base, network, options, critic))
    owner.unet.load_state_dict(network.apply_decoder(base.unet).state_dict())
    description = {
        "stage": "retrieval",
        "pairs": start is not None,
        **asdict(options),
        "noise_power": NOISE_POWER,
        "background": BACKGROUND,
    }
    trainer = Trainer(
        owner,
        owner.batch_loss,
        RetrievalBatches(
            data,
            settings.batch_size,
            settings.seed,
            text_drop=options.text_drop,
            pairs=start is not None,
        ),
        settings,
        out / "retrieval",
        description=description,
        prefetch=2,
        label="retrieval",
        rate_factors=RATE_FACTORS,
    )
    _finish(trainer)
    finished = owner.finished(trainer.ema_state_dict())
    finished.card.training.update(description, **settings.as_json())
    finished.save(out / RETRIEVAL_FILE, torch.float16)
    return finished


def train_pairs(
    out: Path, base: TrainingSettings, retrieval: TrainingSettings, options: RetrievalOptions
) -> None:
    """Goes on from both files in `out` with two characters a picture; saves to its own folder.

    The attribute reader is not kept with a network and would start at random, so it is left out.
    """
    into = out / PAIRS
    trained = train_base(into, base, options.characters, out)
    train_retrieval(into, retrieval, trained, replace(options, reading=0.0), out)


def train_critic(
    out: Path, settings: TrainingSettings, base: PaperdollModel, characters: int
) -> None:
    """Trains and saves the critic, on the characters of the training."""
    data = render_characters(settings.seed, characters)
    torch.manual_seed(settings.seed + 1)
    owner = CriticTraining(base)
    trainer = Trainer(
        owner,
        owner.batch_loss,
        CriticBatches(data, settings.batch_size, settings.seed),
        settings,
        out / "critic",
        description={"stage": "critic", "characters": characters},
        prefetch=2,
        label="critic",
    )
    _finish(trainer)
    with trainer.ema_weights():
        save_safetensors(out / CRITIC_FILE, owner.critic.state_dict(), {"format": CRITIC_FORMAT})


def load_critic(path: Path, base: PaperdollModel) -> Critic:
    """Reads the critic's file; RetrievalError if it is none."""
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != CRITIC_FORMAT:
        raise RetrievalError(
            f"'{path}' has format {metadata.get('format')!r}, not {CRITIC_FORMAT!r}; run the stage "
            "'critic' first."
        )
    critic = make_critic(base)
    load_strictly(critic, tensors, f"critic '{path}'")
    return critic.eval().requires_grad_(False)


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
    ids = torch.tensor([index_truth(d.figure) for d in drawn])
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
    """Runs the trainer to its end; interrupted, it raises KeyboardInterrupt."""
    result = trainer.run()
    print(result.message, flush=True)
    if result.interrupted:
        raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m retrieval_core.paperdoll.train")
    parser.add_argument("--out", type=Path, default=Path("output/paperdoll"))
    parser.add_argument("--stage", choices=STAGES, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--characters", type=int, default=CHARACTERS)
    parser.add_argument("--base-steps", type=int, default=6000)
    parser.add_argument("--base-batch", type=int, default=64)
    parser.add_argument("--base-rate", type=float, default=1.4e-3)
    parser.add_argument("--critic-steps", type=int, default=1500)
    parser.add_argument("--retrieval-steps", type=int, default=8500)
    parser.add_argument("--retrieval-batch", type=int, default=8, help="characters a step")
    parser.add_argument("--retrieval-rate", type=float, default=1.2e-3)
    parser.add_argument("--pairs-base-steps", type=int, default=1500)
    parser.add_argument("--pairs-retrieval-steps", type=int, default=2500)
    parser.add_argument("--pairs-rate", type=float, default=4e-4)
    parser.add_argument("--judge-steps", type=int, default=2500)
    parser.add_argument("--judge-figures", type=int, default=40000)
    parser.add_argument("--lock", choices=LOCKS, default="train_both")
    parser.add_argument("--text-drop", type=float, default=0.3, help="the paper: 0.5")
    parser.add_argument("--face-weight", type=float, default=1.0)
    parser.add_argument("--correspondence", type=float, default=CORRESPONDENCE)
    parser.add_argument("--reading", type=float, default=READING)
    parser.add_argument("--drawing", type=float, default=DRAWING)
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="bfloat16", help="of products; judge: float32"
    )
    parser.add_argument("--threads", type=int, default=2, help="rounding depends on it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    stages = options.stage or list(STAGES)

    def settings(
        steps: int, batch: int, rate: float, precision: Precision | None = None
    ) -> TrainingSettings:
        return TrainingSettings(
            steps=steps,
            batch_size=batch,
            learning_rate=rate,
            warmup_steps=min(100, steps // 10),
            weight_decay=0.01,
            betas=(0.9, 0.99),
            clip_norm=1.0,
            ema_decay=0.998,
            precision=precision or options.precision,
            seed=options.seed,
            checkpoint_every=250,
        )

    retrieval = RetrievalOptions(
        options.characters,
        options.lock,
        options.text_drop,
        options.face_weight,
        options.correspondence,
        options.reading,
        options.drawing,
    )
    try:
        if "base" in stages:
            train_base(
                options.out,
                settings(options.base_steps, options.base_batch, options.base_rate),
                options.characters,
            )
        if "critic" in stages:
            train_critic(
                options.out,
                settings(options.critic_steps, 96, 2e-3),
                load_base(options.out / BASE_FILE),
                options.characters,
            )
        if "retrieval" in stages:
            train_retrieval(
                options.out,
                settings(options.retrieval_steps, options.retrieval_batch, options.retrieval_rate),
                load_base(options.out / BASE_FILE),
                retrieval,
            )
        if "pairs" in stages:
            train_pairs(
                options.out,
                settings(options.pairs_base_steps, options.base_batch, options.pairs_rate),
                settings(
                    options.pairs_retrieval_steps, options.retrieval_batch, options.pairs_rate
                ),
                retrieval,
            )
        if "judge" in stages:
            train_judge(
                options.out,
                settings(options.judge_steps, 128, 2e-3, "float32"),
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
