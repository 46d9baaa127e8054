"""Modules that train the paper-doll weights: models, and their losses on the world's batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..network.controlnet import RetrievalControlNet
from ..training.attributes import AttributeReader
from ..training.critic import Critic, blur_undecided
from ..training.objective import retrieval_loss
from ..training.retrieval_training import TrainableRetrieval
from ..training.settings import Lock
from .batches import READ_SIZES, RetrievalBatch
from .draw import PARTS
from .model import PaperdollModel
from .vae import PatchVAE

Module = TypeVar("Module", bound=nn.Module)

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
    """Loss weights [C], by the pixel change per unit of a channel, tempered to keep details."""
    weights = 1 / vae.scale
    return weights / weights.mean()


def make_norms_contiguous(owner: Module) -> Module:
    """Feeds a module's group norms contiguous maps; returns the module.

    On CPUs that is up to 20 times as fast in bfloat16 as convolutions' channels-last maps.
    """
    for module in owner.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return owner


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
