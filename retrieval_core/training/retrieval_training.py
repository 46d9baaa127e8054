"""What a retrieval training step computes: references to bank to prediction to eq. 1 (§4)."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..bank.encoding import batch_features
from ..bank.site_bank import Bank, make_network_bank
from ..errors import RetrievalError
from ..network.controlnet import (
    DECODER_PARTS,
    RetrievalControlNet,
    select_decoder,
    subtract_decoder,
)
from ..network.unet import SkipHook, UNet
from ..sampling.noise_schedule import NoiseSchedule
from .attributes import AttributeReader
from .correspondence import correspondence_loss, find_parts
from .critic import Critic
from .objective import resize_mask, retrieval_loss
from .pairs import copy_left_to_right, hook_halves, join_halves, split_halves, take_left
from .settings import Lock, choose_trained_parts


class TrainableRetrieval(nn.Module):
    """A retrieval network and a copy of the base U-Net, with the parts of `lock` trainable.

    Args:
        network: the retrieval network to train.
        unet: the base model; it is copied, its encoder is never trained (§4.2).
        schedule: the base model's noise schedule and prediction type.
        lock: "train_both", "lock_decoder" or "lock_both" (§5.4).
        face_weight: lambda of eq. 1.
        correspondence: weight of `correspondence_loss`, where batches name their parts; 0 is the
            paper's own objective.
        reader: reads attributes off what was retrieved, trained along; its loss counts with
            `reading`, where batches name attributes.
        critic: reads the same attributes off what is drawn, trained beforehand, its parameters
            frozen; its loss counts with `drawing`.
        channel_weights: see `retrieval_loss`.
        noise_power: timesteps are drawn as steps * u ** noise_power, u uniform: 1 for all alike,
            less to train more at high noise, where what is drawn is decided.

    Raises:
        RetrievalError: an unknown lock setting.
    """

    def __init__(
        self,
        network: RetrievalControlNet,
        unet: UNet,
        schedule: NoiseSchedule,
        lock: Lock = "train_both",
        face_weight: float = 1.0,
        correspondence: float = 0.0,
        channel_weights: Tensor | None = None,
        noise_power: float = 1.0,
        reader: AttributeReader | None = None,
        reading: float = 0.0,
        critic: Critic | None = None,
        drawing: float = 0.0,
    ) -> None:
        super().__init__()
        parts = choose_trained_parts(lock)
        self.network, self.unet = network, copy.deepcopy(unet)
        self.base_decoder = {k: v.clone() for k, v in select_decoder(unet).items()}
        self.schedule, self.face_weight = schedule, face_weight
        self.correspondence, self.noise_power = correspondence, noise_power
        self.channel_weights = channel_weights
        self.reader, self.reading = reader, reading
        self.critic, self.drawing = critic, drawing
        self.trains_decoder = "decoder" in parts
        self.network.encoder.requires_grad_("encoder" in parts)
        self.network.retrieval.requires_grad_("retrieval" in parts)
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_(self.trains_decoder and name.startswith(DECODER_PARTS))

    def bank(
        self,
        latents: Tensor,
        context: Tensor,
        used: Tensor,
        masks: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Bank:
        """G banks of R references each.

        Args:
            latents: [G * R, C, H, W] clean latents; context: [G * R, L, D].
            used: bool [G, R], False for dropped references.
            masks: bool [G * R, h, w] pixel masks, None for whole references.
        """
        features = self.network.encode_features(latents, context, y)
        tokens = batch_features(features, latents.shape[2:], used, masks)
        return make_network_bank(self.network, tokens)

    def loss(
        self,
        bank: Bank,
        latents: Tensor,
        context: Tensor,
        generator: torch.Generator,
        content: Tensor | None = None,
        face: Tensor | None = None,
        y: Tensor | None = None,
        parts: tuple[Tensor, Tensor, int] | None = None,
        attributes: Tensor | None = None,
        paired: bool = False,
    ) -> dict[str, Tensor]:
        """Equation 1 at a random timestep a row, and the correspondence loss where it is wanted.

        Args:
            bank: G banks; the rows are G runs of equal length.
            latents: targets [B, C, H, W]; context: [B, L, D].
            content, face: pixel masks [B, h, w] or None (see `objective`).
            parts: the targets' and the references' parts, and how many labels there are (see
                `correspondence_loss`).
            attributes: [B, A] of the targets, for the `reader`.
            paired: rows of neighbouring banks are drawn as halves of one picture (see `pairs`),
                at one timestep and by the left row's context.

        Raises:
            RetrievalError: the batch does not divide among the banks, or the banks not in pairs.
        """
        batch, height, width = latents.shape[0], *latents.shape[-2:]
        groups = next(iter(bank.sites.values())).keys.shape[0]
        if batch % groups:
            raise RetrievalError(
                f"{batch} targets cannot be shared among {groups} banks; give each bank equally "
                "many."
            )
        if paired and groups % 2:
            raise RetrievalError(
                f"{groups} banks cannot be paired; give an even number of characters a step."
            )
        device = generator.device  # numbers can only be drawn where the generator lives
        drawn = torch.rand(batch, generator=generator, device=device) ** self.noise_power
        steps = (drawn * self.schedule.steps).long().clamp_max(self.schedule.steps - 1)
        steps = copy_left_to_right(steps, groups) if paired else steps
        eps = torch.randn(latents.shape, generator=generator, device=device).to(latents)
        noised = self.schedule.noised(latents, eps, steps)
        target = self.schedule.target(latents, eps, steps)
        hook = self._hook(bank)
        at = steps.to(latents.device)
        if paired:
            left = [None if t is None else take_left(t, groups) for t in (at, context, y)]
            halves = hook and hook_halves(hook, groups)
            prediction, features = self._run(join_halves(noised, groups), *left, halves)
            prediction, *features = (split_halves(t, groups) for t in (prediction, *features))
        else:
            prediction, features = self._run(noised, at, context, y, hook)
        masks = [None if m is None else resize_mask(m, height, width) for m in (content, face)]
        losses = retrieval_loss(
            prediction, target, masks[0], masks[1], self.face_weight, self.channel_weights
        )
        if parts is not None and self.correspondence:
            sites = self.network.retrieval
            loss = correspondence_loss(sites, features, bank, *parts, generator)
            losses["loss"] = losses["loss"] + self.correspondence * loss
            losses["correspondence"] = loss.detach()
        if parts is not None and attributes is not None and self.reader is not None:
            sites = self.network.retrieval
            loss = self.reader.loss(sites, dict(zip(sites, features)), bank, *parts, attributes)
            losses["loss"] = losses["loss"] + self.reading * loss
            losses["attributes"] = loss.detach()
        if parts is not None and attributes is not None and self.critic is not None:
            site = next(iter(bank.sites.values()))
            found = find_parts(*parts[1:], features[0].shape[-2:], site)
            found = found.repeat_interleave(batch // groups, 0)
            clean = self.schedule.clean(prediction, noised, steps)
            loss = self.critic.loss(clean, attributes, generator, found)
            losses["loss"] = losses["loss"] + self.drawing * loss
            losses["drawn"] = loss.detach()
        return losses

    def _hook(self, bank: Bank) -> SkipHook | None:
        """Adds what every row retrieves; None where all references were dropped from the bank."""
        if bank.empty:
            return None

        def hook(site: str, h: Tensor) -> Tensor:
            entries = bank.sites[site]
            return h + self.network.retrieval[site](h, entries.keys, entries.values, entries.bias)

        return hook

    def _run(
        self,
        noised: Tensor,
        steps: Tensor,
        context: Tensor,
        y: Tensor | None,
        hook: SkipHook | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The prediction and the features of all sites, a row a picture."""
        with torch.no_grad():  # the base encoder is never trained
            emb = self.unet.embed(steps, y, noised.dtype)
            features = self.unet.encode(noised, emb, context)
        return self.unet.decode(features, emb, context, hook), features

    def finished(self, weights: Mapping[str, Tensor]) -> RetrievalControlNet:
        """The network with (averaged) trained weights put in, by their names in this module."""
        network, unet = copy.deepcopy(self.network), copy.deepcopy(self.unet)
        with torch.no_grad():
            for prefix, module in (("network.", network), ("unet.", unet)):
                own = dict(module.named_parameters())
                for name, value in weights.items():
                    if name.startswith(prefix):
                        own[name[len(prefix) :]].copy_(value)
        if self.trains_decoder:
            network.decoder = subtract_decoder(select_decoder(unet), self.base_decoder)
            network.decoder_is_difference = True
        return network.eval().requires_grad_(False)
