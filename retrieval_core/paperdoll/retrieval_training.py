"""A training step of the retrieval network: references to bank to prediction to eq. 1 (§4)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

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
from ..training.correspondence import correspondence_loss, find_parts
from ..training.objective import resize_mask, retrieval_loss
from ..training.settings import Lock
from .attributes import AttributeReader
from .critic import Critic
from .pairs import copy_left_to_right, join_halves, split_halves, take_left

# Part labels of the targets and of the references, and how many labels there are; see
# `correspondence_loss`.
PartLabels = tuple[Tensor, Tensor, int]


class TrainableRetrieval(nn.Module):
    """A retrieval network and a copy of the base U-Net, of which `lock` says what is trained.

    Args:
        network: the retrieval network to train.
        unet: the base model; it is copied, and its encoder is never trained (§4.2).
        schedule: the base model's noise schedule and prediction type.
        lock: what is trained besides the retrieval layers (§5.4): encoder and decoder
            ("train_both"), the encoder ("lock_decoder"), or neither ("lock_both").
        face_weight: lambda of eq. 1.
        correspondence: weight of `correspondence_loss`, for batches with part labels; 0 is the
            paper's own objective.
        channel_weights: see `retrieval_loss`.
        noise_power: timesteps are drawn as steps * u ** noise_power with u uniform; below 1 draws
            more high noise, where what is drawn is decided.
        reader: predicts attributes from retrieved values, trained along; attribute_weight: of its
            loss, for batches with attributes.
        critic: predicts the same attributes from predicted latents, trained beforehand and frozen;
            critic_weight: of its loss.
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
        attribute_weight: float = 0.0,
        critic: Critic | None = None,
        critic_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.network, self.unet = network, copy.deepcopy(unet)
        self.base_decoder = {k: v.clone() for k, v in select_decoder(unet).items()}
        self.schedule, self.face_weight = schedule, face_weight
        self.correspondence, self.noise_power = correspondence, noise_power
        self.channel_weights = channel_weights
        self.reader, self.attribute_weight = reader, attribute_weight
        self.critic, self.critic_weight = critic, critic_weight
        self.trains_decoder = lock == "train_both"
        self.network.requires_grad_(True).encoder.requires_grad_(lock != "lock_both")
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_(self.trains_decoder and name.startswith(DECODER_PARTS))

    def bank(
        self,
        latents: Tensor,
        context: Tensor,
        used: Tensor,
        masks: Tensor | None = None,
    ) -> Bank:
        """G banks of R references each.

        Args:
            latents: [G * R, C, H, W] clean latents; context: [G * R, L, D].
            used: bool [G, R], False for dropped references.
            masks: bool [G * R, h, w] pixel masks, None for whole references.
        """
        features = self.network.encode_features(latents, context)
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
        parts: PartLabels | None = None,
        attributes: Tensor | None = None,
        paired: bool = False,
    ) -> dict[str, Tensor]:
        """Equation 1 at a random timestep per row, with the auxiliary losses if labels are given.

        Args:
            bank: G banks; the rows are G runs of equal length, one run per bank.
            latents: targets [B, C, H, W]; context: [B, L, D].
            content, face: pixel masks [B, h, w] or None (see `retrieval_loss`).
            attributes: [B, A] of the targets, for the reader and the critic.
            paired: rows of neighbouring banks are halves of one picture (see `pairs`), at the left
                row's timestep and with its context.

        Raises:
            RetrievalError: an odd number of banks does not fall into pairs.
        """
        groups = next(iter(bank.sites.values())).keys.shape[0]
        if paired and groups % 2:
            raise RetrievalError(
                f"{groups} banks cannot be paired; give an even number of characters a step."
            )
        device = generator.device  # random numbers are drawn on the generator's device
        drawn = torch.rand(len(latents), generator=generator, device=device) ** self.noise_power
        steps = (drawn * self.schedule.steps).long().clamp_max(self.schedule.steps - 1)
        steps = copy_left_to_right(steps, groups) if paired else steps
        eps = torch.randn(latents.shape, generator=generator, device=device).to(latents)
        noised = self.schedule.noised(latents, eps, steps)
        target = self.schedule.target(latents, eps, steps)

        def retrieve(site: str, h: Tensor) -> Tensor:
            """A bank whose references are dropped adds zero."""
            entries = bank.sites[site]
            return h + self.network.retrieval[site](h, entries.keys, entries.values, entries.bias)

        def retrieve_by_halves(site: str, h: Tensor) -> Tensor:
            return join_halves(retrieve(site, split_halves(h, groups)), groups)

        at = steps.to(latents.device)
        if paired:
            left = [take_left(t, groups) for t in (at, context)]
            pictures = join_halves(noised, groups)
            prediction, features = self._predict(pictures, *left, retrieve_by_halves)
            prediction, *features = (split_halves(t, groups) for t in (prediction, *features))
        else:
            prediction, features = self._predict(noised, at, context, retrieve)
        size = latents.shape[2:]
        masks = [None if m is None else resize_mask(m, size) for m in (content, face)]
        losses = retrieval_loss(prediction, target, *masks, self.face_weight, self.channel_weights)
        if parts is not None:
            clean = self.schedule.clean(prediction, noised, steps)
            auxiliary = self._measure_auxiliary(bank, features, clean, parts, attributes, generator)
            for name, weight, loss in auxiliary:
                losses["loss"] = losses["loss"] + weight * loss
                losses[name] = loss.detach()
        return losses

    def _measure_auxiliary(
        self,
        bank: Bank,
        features: list[Tensor],
        clean: Tensor,
        parts: PartLabels,
        attributes: Tensor | None,
        generator: torch.Generator,
    ) -> Iterator[tuple[str, float, Tensor]]:
        """Name, weight and value of each loss beside equation 1. clean: predicted latents."""
        sites = self.network.retrieval
        if self.correspondence:
            loss = correspondence_loss(sites, features, bank, *parts, generator)
            yield "correspondence", self.correspondence, loss
        if attributes is None:
            return
        if self.reader is not None:
            loss = self.reader.loss(sites, dict(zip(sites, features)), bank, *parts, attributes)
            yield "attributes", self.attribute_weight, loss
        if self.critic is not None:
            site_bank = next(iter(bank.sites.values()))
            found = find_parts(*parts[1:], features[0].shape[-2:], site_bank)
            found = found.repeat_interleave(len(clean) // len(found), 0)
            yield "drawn", self.critic_weight, self.critic.loss(clean, attributes, generator, found)

    def _predict(
        self, noised: Tensor, steps: Tensor, context: Tensor, hook: SkipHook
    ) -> tuple[Tensor, list[Tensor]]:
        """The prediction and the features of all sites."""
        with torch.no_grad():  # the base encoder is never trained
            emb = self.unet.embed(steps, None, noised.dtype)
            features = self.unet.encode(noised, emb, context)
        return self.unet.decode(features, emb, context, hook), features

    def finished(self, weights: Mapping[str, Tensor]) -> RetrievalControlNet:
        """A copy of the network with trained (averaged) weights, by their names in this module."""
        network, unet = copy.deepcopy(self.network), copy.deepcopy(self.unet)
        with torch.no_grad():
            for prefix, module in (("network.", network), ("unet.", unet)):
                own = dict(module.named_parameters())
                for name, value in weights.items():
                    if name.startswith(prefix):
                        own[name.removeprefix(prefix)].copy_(value)
        if self.trains_decoder:
            network.decoder = subtract_decoder(select_decoder(unet), self.base_decoder)
            network.decoder_is_difference = True
        return network.eval().requires_grad_(False)
