"""Reading references with the base U-Net: its self-attention's keys and values at noise levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bank.encoding import split_features
from ..bank.tokens import EncodedReference
from ..network.unet import Attention, UNet
from ..sampling.noise_schedule import NoiseSchedule
from .attention_layers import name_layers
from .training_free_network import TrainingFree, name_site


def make_fixed_noise(shape: Sequence[int]) -> Tensor:
    """Unit noise for references' latents [R, C, H, W], float32 on the CPU, of no seed to choose.

    Every reference gets the same, so that equal references give equal tokens.
    """
    one = torch.randn(tuple(shape[1:]), generator=torch.Generator().manual_seed(0))
    return one[None].expand(tuple(shape))


def record(
    unet: UNet,
    schedule: NoiseSchedule,
    network: TrainingFree,
    latents: Tensor,
    context: Tensor,
    y: Tensor | None = None,
) -> dict[str, tuple[Tensor, tuple[int, int]]]:
    """Keys and values of references [R, C, H, W], read once at each noise level: `Features`.

    Args:
        unet: the base model's. schedule: its noise schedule.
        latents: clean, scaled as the base model's latents are.
        context: [R, L, D] text context of each reference. y: [R, A] where the base has one.
    """
    wanted = {layer: name for layer, name in name_layers(unet).items() if name in network.names}
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
            return layer.attend(q, k, v, heads)

        noised = schedule.noised(latents, noise, steps)
        unet(noised, steps, context, y, self_attention=record_layer)
    return recorded


def encode_by_base(
    unet: UNet,
    schedule: NoiseSchedule,
    network: TrainingFree,
    latents: Tensor,
    context: Tensor,
    y: Tensor | None = None,
    masks: Sequence[Tensor | None] | None = None,
    weights: Sequence[float] | None = None,
    concepts: Sequence[str] | None = None,
) -> list[EncodedReference]:
    """`record` and `split_features`: `encode_references` without a trained network.

    Raises:
        RetrievalError: a mask selects nothing.
    """
    recorded = record(unet, schedule, network, latents, context, y)
    masks = masks or [None] * len(latents)
    return split_features(recorded, latents.shape[2:], masks, weights, concepts)
