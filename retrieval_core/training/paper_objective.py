"""The paper's training step on any base: references to bank to prediction to equation 1 (§4).

Three terms go past the paper; their weights are 0 by default. See `PaperObjective.forward`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..bank.encoding import batch_features
from ..bank.site_bank import Bank, make_network_bank
from ..bank.tokens import Tokens
from ..network.controlnet import DECODER_PARTS, RetrievalControlNet, subtract_decoder
from ..network.unet import ResBlock, TransformerBlock, UNet
from ..sampling.noise_schedule import NoiseSchedule
from .correspondence import UNKNOWN, average_parts, correspondence_loss, count_labels
from .low_rank import add_low_rank, merge_low_rank
from .objective import resize_mask, retrieval_loss, weigh_squares, weigh_timesteps
from .reconstruction import FeatureReader
from .run_config import RunConfig
from .task_batches import Batch

# Modules that start as copies of trained ones.
COPIED = ("network.encoder.", "unet.")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


Module = TypeVar("Module", bound=nn.Module)


class PaperObjective(nn.Module):
    """A retrieval network and the base U-Net whose decoder is trained with it.

    The retrieval layers are always trained, encoder and decoder as `config.lock` says, or as
    `config.rank` says by low-rank products. The base's encoder never is (§4.2). Frozen matrices are
    stored in the precision that they are used in.

    Args:
        network: the network to train. unet: the base model, which is trained in place.
        schedule: the base's noise schedule and prediction type.
        blank: latent [1, C, H, W] of a grey picture, which an inpainting base sees in place of the
            picture that it is to fill in; None for other bases.
        channel_weights: see `Base`.
    """

    def __init__(
        self,
        network: RetrievalControlNet,
        unet: UNet,
        schedule: NoiseSchedule,
        config: RunConfig,
        blank: Tensor | None = None,
        channel_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network, self.unet, self.schedule, self.config = network, unet, schedule, config
        self.register_buffer("blank", blank, persistent=False)
        self.register_buffer("channel_weights", channel_weights, persistent=False)
        self.reader = None
        if config.reconstruction:
            self.reader = FeatureReader(network.retrieval)
        self.trains_decoder = config.lock == "train_both"
        network.requires_grad_(True).encoder.requires_grad_(config.lock != "lock_both")
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(self.trains_decoder and name.startswith(DECODER_PARTS))
        if config.rank is not None:
            self._train_low_rank(config.rank)
        self._convert_frozen(HALF.get(config.precision))
        # In main memory, for the difference that the file stores.
        weights = merge_low_rank(unet.state_dict()) if self.trains_decoder else {}
        self.base_decoder = {
            k: v.cpu().clone() for k, v in weights.items() if k.startswith(DECODER_PARTS)
        }
        make_norms_contiguous(self)
        if config.checkpoint_activations:
            recompute_activations(self)

    def _train_low_rank(self, rank: int) -> None:
        generator = torch.Generator().manual_seed(self.config.seed)
        if self.config.lock != "lock_both":
            add_low_rank(self.network.encoder, rank, generator)
        if self.trains_decoder:
            add_low_rank(self.unet.output_blocks, rank, generator)
            add_low_rank(self.unet.out, rank, generator)

    def _convert_frozen(self, dtype: torch.dtype | None) -> None:
        """Vectors, of norms above all, stay in float32: autocast does not convert them."""
        for parameter in self.parameters():
            if dtype is not None and not parameter.requires_grad and parameter.ndim > 1:
                parameter.data = parameter.data.to(dtype)

    def forward(self, batch: Batch, timesteps: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Equation 1 and its terms (see `retrieval_loss`), and the terms that the settings add.

        "parts": equation 1 over each labelled part by itself, so that small ones (eyes) count as
        much as large ones. "correspondence": attention goes to the same part. "reconstruction":
        see `FeatureReader`.

        Args:
            batch: B targets, on the parameters' device.
            timesteps: [B]. noise: [B, C, H, W], see `draw_noise`.
        """
        config = self.config
        noised = self.schedule.noised(batch.latents, noise, timesteps)
        tokens = self.encode_references(batch)
        bank = make_network_bank(self.network, tokens, config.token_budget)
        emb, features = self.encode(noised, timesteps, batch.context, batch.y)
        prediction = self.decode(features, emb, batch.context, bank).float()
        target = self.schedule.target(batch.latents, noise, timesteps)
        weights = None
        if config.min_snr is not None:
            weights = weigh_timesteps(self.schedule, timesteps, config.min_snr)
        losses = retrieval_loss(
            prediction,
            target,
            batch.content,
            batch.face,
            config.face_weight,
            self.channel_weights,
            weights,
        )

        def add(name: str, weight: float, loss: Tensor) -> None:
            losses["loss"] = losses["loss"] + weight * loss
            losses[name] = loss.detach()

        if config.part_weight:
            squares = weigh_squares(prediction - target, self.channel_weights, weights)
            add("parts", config.part_weight, average_parts(squares, batch.parts))
        if config.correspondence:
            whole = bank
            if config.token_budget is not None:  # merged tokens have no labels
                whole = make_network_bank(self.network, tokens)
            add("correspondence", config.correspondence, self.compare_parts(batch, features, whole))
        if self.reader is not None:
            still = torch.zeros_like(timesteps)
            _, clean = self.encode(batch.latents, still, batch.context, batch.y)
            figure = batch.content
            if batch.parts is not None:
                figure = resize_mask((batch.parts > 0) & (batch.parts < UNKNOWN), figure.shape[2:])
            loss = self.reader.loss(self.network.retrieval, features, clean, bank, figure)
            add("reconstruction", config.reconstruction, loss)
        return losses

    def compare_parts(self, batch: Batch, features: list[Tensor], bank: Bank) -> Tensor:
        """`correspondence_loss` of the labelled targets; bank: of all tokens."""
        parts, shown = batch.parts, batch.reference_parts.flatten(0, 1)
        count = count_labels(torch.cat([parts, shown]))
        generator = seed_generator(self.config.seed, int(batch.numbers[0]))
        sites = self.network.retrieval
        return correspondence_loss(sites, features, bank, parts, shown, count, generator)

    def make_bank(self, batch: Batch) -> Bank:
        """One bank per item, its tokens merged to the budget of inference."""
        return make_network_bank(
            self.network, self.encode_references(batch), self.config.token_budget
        )

    def encode_references(self, batch: Batch) -> Tokens:
        """The tokens of each item's references."""
        latents, context, y, masks = (
            None if t is None else t.flatten(0, 1)
            for t in (
                batch.reference_latents,
                batch.reference_context,
                batch.reference_y,
                batch.reference_masks,
            )
        )
        features = self.network.encode_features(latents, context, y)
        return batch_features(features, latents.shape[2:], batch.used, masks)

    def predict(
        self,
        noised: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None,
        bank: Bank | None,
    ) -> Tensor:
        """The base model's prediction [B, C, H, W] with retrieval from `bank`, or without one."""
        emb, features = self.encode(noised, timesteps, context, y)
        return self.decode(features, emb, context, bank)

    @torch.no_grad()
    def encode(
        self, noised: Tensor, timesteps: Tensor, context: Tensor, y: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The base's time embedding, and its features at all sites."""
        inputs = noised
        if self.blank is not None:
            everywhere = torch.ones_like(noised[:, :1])
            inputs = torch.cat([noised, everywhere, self.blank.expand_as(noised)], 1)
        emb = self.unet.embed(timesteps.to(noised.device), y, noised.dtype)
        return emb, self.unet.encode(inputs, emb, context)

    def decode(
        self, features: list[Tensor], emb: Tensor, context: Tensor, bank: Bank | None
    ) -> Tensor:
        """The prediction from `encode`'s features, with retrieval from `bank`."""

        def retrieve(site: str, h: Tensor) -> Tensor:
            found = bank.sites[site]
            return h + self.network.retrieval[site](h, found.keys, found.values, found.bias)

        return self.unet.decode(features, emb, context, None if bank is None else retrieve)

    @torch.no_grad()
    def finish(self, trained: Mapping[str, Tensor]) -> RetrievalControlNet:
        """The network with trained (averaged) weights, by their names here, in main memory."""
        weights = {name: tensor.cpu() for name, tensor in self.state_dict().items()}
        weights = merge_low_rank({**weights, **trained})
        network = RetrievalControlNet(
            self.network.config, self.network.card, query_pooling=self.network.query_pooling
        )
        prefix = "network."
        network.load_state_dict(
            {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        )
        if self.trains_decoder:
            decoder = {name: weights[f"unet.{name}"].float() for name in self.base_decoder}
            network.decoder = subtract_decoder(decoder, self.base_decoder)
        return network.eval().requires_grad_(False)


def make_norms_contiguous(owner: Module) -> Module:
    """Feeds a module's group norms contiguous maps; returns the module.

    On CPUs that is up to 20 times as fast in bfloat16 as convolutions' channels-last maps.
    """
    for module in owner.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return owner


def recompute_activations(module: nn.Module) -> None:
    """Lets residual and transformer blocks store their input alone for the backward pass."""
    for block in module.modules():
        if isinstance(block, (ResBlock, TransformerBlock)):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def seed_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one step, from seed and step alone: resuming needs no generator state."""
    (derived,) = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return torch.Generator(device=device).manual_seed(int(derived))


def draw_noise(
    seed: int,
    numbers: Tensor,
    shape: Sequence[int],
    steps: int,
    offset: float,
    power: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Timesteps [B] below `steps` and noise [B, *shape] for B items.

    A row depends on the seed and the item's number in the run alone, so that neither the number of
    processes nor resumption changes it.

    Args:
        numbers: int64 [B], see `Batch`.
        shape: of a latent, channels first.
        offset: strength of noise that is one number for a channel (noise offset).
        power: timesteps are steps * u ** power with u uniform.
    """
    timesteps, noise = [], []
    for number in numbers.tolist():
        generator = seed_generator(seed, number)
        drawn = torch.rand((), generator=generator, dtype=torch.float64) ** power
        timesteps.append((drawn * steps).long())
        common = torch.randn(shape[0], 1, 1, generator=generator)
        noise.append(torch.randn(*shape, generator=generator) + offset * common)
    return torch.stack(timesteps), torch.stack(noise)
