"""Trains the bundled paper-doll weights from a seed: `python -m retrieval_core.paperdoll.train`.

Stages, each resumable: `base` (U-Net and text encoder), `critic` (classifies attributes of
latents), `retrieval` (the paper's network on that base, with the critic's loss), `pairs` (continues
both, every other batch with two characters in a picture twice as wide; its files are bundled),
`judge` (classifies attributes of pictures). Without --stage all run in that order.

`--stage base --recipe second --device cuda --out DIR` trains another base model of the same world,
to measure by; with a copy of the bundled judge in DIR, the measurements take it as --weights DIR.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import RetrievalError
from ..files import check_format, read_safetensors, save_safetensors
from ..network.controlnet import RetrievalControlNet, load
from ..network.unet import UNetConfig, load_strictly
from ..training.objective import retrieval_loss
from ..training.paper_objective import make_norms_contiguous
from ..training.settings import LOCKS, Lock
from .attributes import AttributeReader
from .batches import (
    READ_SIZES,
    BaseBatches,
    CriticBatches,
    RetrievalBatch,
    RetrievalBatches,
    render_any,
    render_characters,
    stack_images,
)
from .bundle import BASE_FILE, JUDGE_FILE, RETRIEVAL_FILE
from .critic import Critic, blur_undecided
from .draw import PARTS
from .judge import Judge, index_truth
from .model import CONFIG, SECOND_CONFIG, SECOND_PATCH, PaperdollModel, load_base
from .retrieval_training import TrainableRetrieval
from .text import LENGTH
from .trainer import Batches, LossFunction, Trainer
from .training_settings import PRECISIONS, Precision, TrainingSettings
from .vae import PATCH, PatchVAE

STAGES = ("base", "critic", "retrieval", "pairs", "judge")
# Lower for the network's encoder and the decoder, which start as copies of trained layers.
RATE_FACTORS = {"network.encoder.": 0.5, "unet.": 0.7}
CRITIC_FILE = "paperdoll_critic.safetensors"
CRITIC_FORMAT = "paperdoll_critic"
NOISE_POWER = 0.6
BACKGROUND = 0.3  # weight of the background's loss; the figure's is 1


@dataclass(frozen=True)
class RetrievalOptions:
    """Options of the network's training beside `TrainingSettings`; see `TrainableRetrieval`.

    correspondence, reading, drawing: weights of the attention's, the attribute reader's and the
    critic's losses.
    """

    characters: int = 3000
    lock: Lock = "train_both"
    text_drop: float = 0.3
    face_weight: float = 1.0
    correspondence: float = 0.2
    reading: float = 0.3
    drawing: float = 0.3


@dataclass(frozen=True)
class BaseRecipe:
    """A base model's form and the settings of its training; patch: see `PatchVAE`."""

    config: UNetConfig
    patch: int
    steps: int
    batch: int
    rate: float
    checkpoint_every: int


RECIPES = {
    "bundled": BaseRecipe(CONFIG, PATCH, 6000, 64, 1.4e-3, 250),
    "second": BaseRecipe(SECOND_CONFIG, SECOND_PATCH, 3000, 256, 1.6e-3, 2000),
}


class BaseTraining(nn.Module):
    """The base model's diffusion loss on pictures and tags."""

    def __init__(self, model: PaperdollModel) -> None:
        super().__init__()
        self.unet, self.text = model.unet, model.text
        self.vae, self.schedule = model.vae.eval(), model.schedule

    def loss(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        images, ids = batch
        device = generator.device
        latents = self.vae.encode(images)
        steps = torch.randint(self.schedule.steps, (len(ids),), generator=generator, device=device)
        eps = torch.randn(latents.shape, generator=generator, device=device)
        prediction = self.unet(self.schedule.noised(latents, eps, steps), steps, self.text(ids))
        target = self.schedule.target(latents, eps, steps)
        return retrieval_loss(prediction, target, channel_weights=weigh_channels(self.vae))


def weigh_channels(vae: PatchVAE) -> Tensor:
    """Loss weights [C], by the pixel change per unit of a channel, tempered to keep details."""
    weights = 1 / vae.scale
    return weights / weights.mean()


class PaperdollRetrieval(TrainableRetrieval):
    """`TrainableRetrieval` on `RetrievalBatch`es, by the base's text encoder and VAE."""

    def __init__(
        self,
        base: PaperdollModel,
        network: RetrievalControlNet,
        options: RetrievalOptions,
        critic: Critic | None = None,
    ) -> None:
        reader = None
        if options.reading:
            # The features of the first two sites are convolutions with small receptive fields.
            deeper = dict(list(network.config.site_channels().items())[2:])
            reader = AttributeReader(deeper, READ_SIZES)
        super().__init__(
            network,
            base.unet,
            base.schedule,
            options.lock,
            options.face_weight,
            options.correspondence,
            weigh_channels(base.vae),
            NOISE_POWER,
            reader,
            options.reading,
            critic,
            options.drawing,
        )
        self.text, self.vae = base.text.requires_grad_(False), base.vae.eval()

    def batch_loss(self, batch: RetrievalBatch, generator: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            context, reference_context = self.text(batch.ids), self.text(batch.reference_ids)
            latents = self.vae.encode(batch.targets)
            references = self.vae.encode(batch.references)
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
            paired=batch.paired,
        )


class CriticTraining(nn.Module):
    """The critic and its loss on latents blurred as at high noise (`blur_undecided`)."""

    def __init__(self, base: PaperdollModel) -> None:
        super().__init__()
        self.critic = make_critic(base)
        self.vae = base.vae.eval()

    def batch_loss(
        self, batch: tuple[Tensor, Tensor, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        images, others, values = batch
        one, other = self.vae.encode(images), self.vae.encode(others)
        return {"loss": self.critic.loss(blur_undecided(one, other, generator), values, generator)}


def make_critic(base: PaperdollModel) -> Critic:
    return Critic(base.unet.config.in_channels, base.latent_size, READ_SIZES)


def train_base(
    out: Path,
    settings: TrainingSettings,
    characters: int,
    start: Path | None = None,
    recipe: BaseRecipe = RECIPES["bundled"],
    device: str = "cpu",
) -> PaperdollModel:
    """Trains and saves the base model; returns it with its averaged weights, on the CPU.

    Args:
        start: folder of a trained model to continue from with pairs; None: from scratch, by
            `recipe`.

    Raises:
        KeyboardInterrupt: interrupted; the run is saved, and the model as it is.
    """
    data = render_characters(settings.seed, characters)
    torch.manual_seed(settings.seed)
    if start is None:
        model = PaperdollModel(recipe.config, recipe.patch)
        model.initialise()
        pictures = stack_images(sum(data[:200], []))
        model.vae = PatchVAE.fit(pictures, model.vae.channels, recipe.patch)
    else:
        model = load_base(start / BASE_FILE)
        model.requires_grad_(True)
    owner = make_norms_contiguous(BaseTraining(model))
    pairs = start is not None
    batches = BaseBatches(data, settings.batch_size, settings.seed, pairs, device)
    description = {"stage": "base", "pairs": pairs, "characters": characters}
    trainer = Trainer(
        owner, owner.loss, batches, settings, out / "base", device=device, description=description
    )
    if model.device.type == "cuda" and not pairs:  # which have batches of two shapes
        capture_unet(model, settings)
    interrupted = trainer.run()
    with trainer.ema.swapped_in():
        model.save(out / BASE_FILE, torch.float16)
    if interrupted:
        raise KeyboardInterrupt
    return load_base(out / BASE_FILE)


def capture_unet(model: PaperdollModel, settings: TrainingSettings) -> None:
    """Records the passes of the model's U-Net as CUDA graphs.

    Launching the kernels of so small a network one by one takes longer than running them.
    """
    unet, count, device = model.unet, settings.batch_size, model.device
    shape = count, unet.config.in_channels, model.latent_size, model.latent_size
    noised = torch.randn(shape, device=device)
    steps = torch.zeros(count, dtype=torch.long, device=device)
    context = torch.randn(count, LENGTH, unet.config.context_dim, device=device)
    half = settings.precision == "bfloat16"
    with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
        torch.cuda.make_graphed_callables(unet, (noised, steps, context.requires_grad_()))


def train_retrieval(
    out: Path,
    settings: TrainingSettings,
    base: PaperdollModel,
    options: RetrievalOptions,
    start: Path | None = None,
) -> None:
    """Trains and saves a network on a trained base.

    Args:
        start: folder of a trained network to continue from with pairs; None: a fresh one.
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
    batches = RetrievalBatches(
        data, settings.batch_size, settings.seed, options.text_drop, pairs=start is not None
    )
    trainer = _train(
        owner, owner.batch_loss, batches, settings, out, description, rate_factors=RATE_FACTORS
    )
    finished = owner.finished(trainer.ema.averages)
    finished.card.training.update(description, **settings.as_json())
    finished.save(out / RETRIEVAL_FILE, torch.float16)


def train_pairs(
    out: Path, base: TrainingSettings, retrieval: TrainingSettings, options: RetrievalOptions
) -> None:
    """Continues from both files in `out` with two characters per picture; saves to `out`/pairs.

    The attribute reader is not saved with a network and would start at random, so it is left out.
    """
    into = out / "pairs"
    trained = train_base(into, base, options.characters, out)
    train_retrieval(into, retrieval, trained, replace(options, reading=0.0), out)


def train_critic(
    out: Path, settings: TrainingSettings, base: PaperdollModel, characters: int
) -> None:
    """Trains and saves the critic, on the characters that the network is trained on."""
    data = render_characters(settings.seed, characters)
    torch.manual_seed(settings.seed + 1)
    owner = CriticTraining(base)
    batches = CriticBatches(data, settings.batch_size, settings.seed)
    description = {"stage": "critic", "characters": characters}
    trainer = _train(owner, owner.batch_loss, batches, settings, out, description)
    with trainer.ema.swapped_in():
        save_safetensors(out / CRITIC_FILE, owner.critic.state_dict(), {"format": CRITIC_FORMAT})


def load_critic(path: Path, base: PaperdollModel) -> Critic:
    """Reads the critic's file; RetrievalError if the format is another."""
    tensors, metadata = read_safetensors(path)
    check_format(path, metadata, CRITIC_FORMAT, "run the stage 'critic' first")
    critic = make_critic(base)
    load_strictly(critic, tensors, f"critic '{path}'")
    return critic.eval().requires_grad_(False)


@dataclass(frozen=True)
class JudgeBatches:
    """Rendered figures and their true attributes; half of them encoded and decoded by the VAE."""

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


def train_judge(out: Path, settings: TrainingSettings, figures: int, vae: PatchVAE) -> None:
    """Trains and saves the judge on figures of the whole world, held-out ones included."""
    drawn = render_any(settings.seed, figures)
    images = torch.from_numpy(np.stack([d.image for d in drawn])).movedim(-1, 1)
    ids = torch.tensor([index_truth(d.figure) for d in drawn])
    torch.manual_seed(settings.seed)
    judge = Judge()
    batches = JudgeBatches(images, ids, vae, settings.batch_size, settings.seed)
    description = {"stage": "judge", "figures": figures}
    trainer = _train(judge, judge.loss, batches, settings, out, description)
    with trainer.ema.swapped_in():
        judge.save(out / JUDGE_FILE)


def _train(
    owner: nn.Module,
    loss: LossFunction,
    batches: Batches,
    settings: TrainingSettings,
    out: Path,
    description: dict[str, Any],
    **given: Any,
) -> Trainer:
    """Trains one stage, in a folder of `out` named after it; returns its trainer.

    Raises:
        KeyboardInterrupt: interrupted; the run is saved.
    """
    folder = out / description["stage"]
    trainer = Trainer(owner, loss, batches, settings, folder, description=description, **given)
    if trainer.run():
        raise KeyboardInterrupt
    return trainer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m retrieval_core.paperdoll.train")
    parser.add_argument("--out", type=Path, default=Path("output/paperdoll"))
    parser.add_argument("--stage", choices=STAGES, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--characters", type=int, default=RetrievalOptions.characters)
    parser.add_argument("--recipe", choices=RECIPES, default="bundled", help="of the base")
    parser.add_argument("--base-steps", type=int, help="default: the recipe's")
    parser.add_argument("--base-batch", type=int, help="default: the recipe's")
    parser.add_argument("--base-rate", type=float, help="default: the recipe's")
    parser.add_argument(
        "--device", default="cpu", help="of the stage base, such as cuda; the others run on CPUs"
    )
    parser.add_argument("--critic-steps", type=int, default=1500)
    parser.add_argument("--retrieval-steps", type=int, default=8500)
    parser.add_argument("--retrieval-batch", type=int, default=8, help="characters a step")
    parser.add_argument("--retrieval-rate", type=float, default=1.2e-3)
    parser.add_argument("--pairs-base-steps", type=int, default=1500)
    parser.add_argument("--pairs-retrieval-steps", type=int, default=2500)
    parser.add_argument("--pairs-rate", type=float, default=4e-4)
    parser.add_argument("--judge-steps", type=int, default=2500)
    parser.add_argument("--judge-figures", type=int, default=40000)
    parser.add_argument("--lock", choices=LOCKS, default=RetrievalOptions.lock)
    parser.add_argument(
        "--text-drop", type=float, default=RetrievalOptions.text_drop, help="the paper: 0.5"
    )
    for name in ("face-weight", "correspondence", "reading", "drawing"):
        default = getattr(RetrievalOptions, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="bfloat16", help="of products; judge: float32"
    )
    parser.add_argument("--threads", type=int, default=2, help="rounding depends on it")
    options = parser.parse_args(arguments)
    out = options.out
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True  # all batches have the same shapes
    stages = options.stage or list(STAGES)
    chosen = {name: getattr(options, f"base_{name}") for name in ("steps", "batch", "rate")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    recipe = replace(RECIPES[options.recipe], **chosen)

    def settings(
        steps: int,
        batch: int,
        rate: float,
        precision: Precision = options.precision,
        checkpoint_every: int = 250,
    ) -> TrainingSettings:
        return TrainingSettings(
            steps,
            batch,
            rate,
            warmup_steps=min(100, steps // 10),
            betas=(0.9, 0.99),
            ema_decay=0.998,
            precision=precision,
            seed=options.seed,
            checkpoint_every=checkpoint_every,
        )

    retrieval = RetrievalOptions(
        **{field.name: getattr(options, field.name) for field in fields(RetrievalOptions)}
    )
    try:
        if "base" in stages:
            base = settings(
                recipe.steps, recipe.batch, recipe.rate, checkpoint_every=recipe.checkpoint_every
            )
            train_base(out, base, options.characters, recipe=recipe, device=options.device)
        if "critic" in stages:
            critic = settings(options.critic_steps, 96, 2e-3)
            train_critic(out, critic, load_base(out / BASE_FILE), options.characters)
        if "retrieval" in stages:
            train_retrieval(
                out,
                settings(options.retrieval_steps, options.retrieval_batch, options.retrieval_rate),
                load_base(out / BASE_FILE),
                retrieval,
            )
        if "pairs" in stages:
            train_pairs(
                out,
                settings(options.pairs_base_steps, recipe.batch, options.pairs_rate),
                settings(
                    options.pairs_retrieval_steps, options.retrieval_batch, options.pairs_rate
                ),
                retrieval,
            )
        if "judge" in stages:
            judge = settings(options.judge_steps, 128, 2e-3, "float32")
            train_judge(out, judge, options.judge_figures, load_base(out / BASE_FILE).vae)
    except RetrievalError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps({"out": str(out), "stages": stages}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
