"""Encoding of references by the base U-Net: keys and values of its self-attention layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bank.encoding import Features
from ..bank.tokens import MATCHED
from ..network.unet import Attention, UNet
from ..sampling.noise_schedule import NoiseSchedule
from .attention_layers import name_layers
from .latent_pull import make_match_tokens
from .training_free_network import TrainingFree, name_site


def make_fixed_noise(shape: Sequence[int]) -> Tensor:
    """Unit noise [R, C, H, W] for references' latents, float32 on the CPU, of a fixed seed.

    Every reference gets the same noise, so that equal references give equal tokens.
    """
    one = torch.randn(tuple(shape[1:]), generator=torch.Generator().manual_seed(0))
    return one[None].expand(tuple(shape))


def record(
    unet: UNet,
    schedule: NoiseSchedule,
    network: TrainingFree,
    latents: Tensor,
    context: Tensor,
) -> Features:
    """Records the references' layers at each noise level; one pass of the U-Net a level.

    Args:
        unet: the base model's. schedule: its noise schedule.
        latents: [R, C, H, W], clean, scaled as the base model's latents are.
        context: [R, L, D] text context of each reference.

    Returns:
        `name_site` -> [R, 2, N, D] keys and values, and the layer's height and width; more than
        the sites of a bank (`TrainingFree.recorded`).
    """
    chosen = network.recorded
    wanted = {layer: name for layer, name in name_layers(unet).items() if name in chosen}
    noise = make_fixed_noise(latents.shape).to(latents)
    recorded: dict[str, tuple[Tensor, tuple[int, int]]] = {}
    for timestep in network.timesteps(schedule.steps):
        steps = torch.full((len(latents),), timestep, device=latents.device)

        def record_layer(
            layer: Attention, size: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, heads: int
        ) -> Tensor:
            if layer in wanted:
                site = name_site(wanted[layer], timestep)  # noqa: B023
                recorded[site] = torch.stack([k, v], 1), size
                if wanted[layer] == network.match_layer:
                    site = name_site(MATCHED, timestep)  # noqa: B023
                    recorded[site] = make_match_tokens(k, latents, size), size
            return layer.attend(q, k, v, heads)

        noised = schedule.noised(latents, noise, steps)
        unet(noised, steps, context, self_attention=record_layer)
    return recorded
