"""The paper's training step on any base: references to bank to prediction to equation 1 (§4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..bank.encoding import batch_features
from ..bank.site_bank import Bank, make_network_bank
from ..network.controlnet import DECODER_PARTS, RetrievalControlNet, subtract_decoder
from ..network.unet import ResBlock, TransformerBlock, UNet
from ..sampling.noise_schedule import NoiseSchedule
from .low_rank import add_low_rank, merge_low_rank
from .objective import retrieval_loss, weigh_timesteps
from .run_config import RunConfig
from .task_batches import Batch
from .trainer import seed_generator

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
    """

    def __init__(
        self,
        network: RetrievalControlNet,
        unet: UNet,
        schedule: NoiseSchedule,
        config: RunConfig,
        blank: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network, self.unet, self.schedule, self.config = network, unet, schedule, config
        self.register_buffer("blank", blank, persistent=False)
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
        """Equation 1 and its terms, see `retrieval_loss`.

        Args:
            batch: B targets with R references each, on the parameters' device.
            timesteps: [B]. noise: [B, C, H, W], see `draw_noise`.
        """
        noised = self.schedule.noised(batch.latents, noise, timesteps)
        bank = self.make_bank(batch)
        prediction = self.predict(noised, timesteps, batch.context, batch.y, bank).float()
        target = self.schedule.target(batch.latents, noise, timesteps)
        weights = None
        if self.config.min_snr is not None:
            weights = weigh_timesteps(self.schedule, timesteps, self.config.min_snr)
        return retrieval_loss(
            prediction,
            target,
            batch.content,
            batch.face,
            self.config.face_weight,
            row_weights=weights,
        )

    def make_bank(self, batch: Batch) -> Bank:
        """One bank per target, its tokens merged to the budget of inference."""
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
        tokens = batch_features(features, latents.shape[2:], batch.used, masks)
        return make_network_bank(self.network, tokens, self.config.token_budget)

    def predict(
        self,
        noised: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None,
        bank: Bank | None,
    ) -> Tensor:
        """The base model's prediction [B, C, H, W] with retrieval from `bank`, or without one."""

        def retrieve(site: str, h: Tensor) -> Tensor:
            found = bank.sites[site]
            return h + self.network.retrieval[site](h, found.keys, found.values, found.bias)

        inputs = noised
        if self.blank is not None:
            everywhere = torch.ones_like(noised[:, :1])
            inputs = torch.cat([noised, everywhere, self.blank.expand_as(noised)], 1)
        with torch.no_grad():
            emb = self.unet.embed(timesteps.to(noised.device), y, noised.dtype)
            features = self.unet.encode(inputs, emb, context)
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


def recompute_activations(module: nn.Module) -> None:
    """Lets residual and transformer blocks store their input alone for the backward pass."""
    for block in module.modules():
        if isinstance(block, (ResBlock, TransformerBlock)):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def draw_noise(
    seed: int, numbers: Tensor, shape: Sequence[int], steps: int, offset: float
) -> tuple[Tensor, Tensor]:
    """Timesteps [B] below `steps` and noise [B, *shape] for B items.

    A row depends on the seed and the item's number in the run alone, so that neither the number of
    processes nor resumption changes it.

    Args:
        numbers: int64 [B], see `Batch`.
        shape: of a latent, channels first.
        offset: strength of noise that is one number for a channel (noise offset).
    """
    timesteps, noise = [], []
    for number in numbers.tolist():
        generator = seed_generator(seed, number)
        timesteps.append(torch.randint(steps, (), generator=generator))
        common = torch.randn(shape[0], 1, 1, generator=generator)
        noise.append(torch.randn(*shape, generator=generator) + offset * common)
    return torch.stack(timesteps), torch.stack(noise)
