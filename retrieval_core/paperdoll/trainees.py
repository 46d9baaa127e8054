"""What the paper-doll weights are trained on: models, losses and how batches are fed to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..network.controlnet import RetrievalControlNet
from ..training.attributes import AttributeReader, choose_deeper_sites
from ..training.critic import Critic, blur_undecided
from ..training.objective import retrieval_loss
from ..training.retrieval_training import TrainableRetrieval
from ..training.settings import Lock
from .batches import READ_SIZES, RetrievalBatch
from .draw import PARTS
from .model import PaperdollModel
from .vae import PatchVAE

Module = TypeVar("Module", bound=nn.Module)

CHARACTERS = 3000
CORRESPONDENCE = 0.2
NOISE_POWER = 0.6
READING = 0.3  # weight of the attribute loss
DRAWING = 0.3  # weight of the critic's loss
BACKGROUND = 0.3  # what the loss counts there, beside 1 on the figure


@dataclass(frozen=True)
class RetrievalOptions:
    """What the network's training takes beside the settings; see `TrainableRetrieval`."""

    characters: int = CHARACTERS
    lock: Lock = "train_both"
    text_drop: float = 0.3
    face_weight: float = 1.0
    correspondence: float = CORRESPONDENCE
    reading: float = READING
    drawing: float = DRAWING


class BaseTraining(nn.Module):
    """The base model's diffusion loss on pictures and tags."""

    def __init__(self, model: PaperdollModel) -> None:
        super().__init__()
        self.unet, self.text = model.unet, model.text
        self.vae, self.schedule = model.vae.eval(), model.schedule

    def loss(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        images, ids = batch
        latents = self.vae.encode(images)
        steps = torch.randint(self.schedule.steps, (len(ids),), generator=generator)
        eps = torch.randn(latents.shape, generator=generator)
        prediction = self.unet(self.schedule.noised(latents, eps, steps), steps, self.text(ids))
        target = self.schedule.target(latents, eps, steps)
        return retrieval_loss(prediction, target, channel_weights=weigh_channels(self.vae))


def weigh_channels(vae: PatchVAE) -> Tensor:
    """[C]: an error counts by what it changes in pixels, tempered, as details count too."""
    weights = 1 / vae.scale
    return weights / weights.mean()


def make_norms_contiguous(owner: Module) -> Module:
    """The module, its group norms fed contiguous maps: on CPUs they are up to 20 times as fast
    in bfloat16 as on the channels-last maps that convolutions leave.
    """
    for module in owner.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return owner


class PaperdollRetrieval(TrainableRetrieval):
    """`TrainableRetrieval` fed with the world's batches through the base's text encoder and VAE."""

    def __init__(
        self,
        base: PaperdollModel,
        network: RetrievalControlNet,
        options: RetrievalOptions,
        critic: Critic | None = None,
    ) -> None:
        reader = None
        if options.reading:
            widths = network.config.site_channels()
            widths = {site: widths[site] for site in choose_deeper_sites(list(widths))}
            reader = AttributeReader(widths, READ_SIZES)
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
    """The critic's loss on latents as they look at high noise (`blur_undecided`)."""

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
