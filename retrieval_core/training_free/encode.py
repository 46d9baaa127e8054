"""Reading references with the base U-Net: its self-attention's keys and values at noise levels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import RetrievalError
from ..references import token_mask
from ..schedule import NoiseSchedule
from ..tokens import EncodedReference
from ..unet import Attention, UNet
from .layers import layer_modules
from .network import TrainingFree, site_name

# site -> (keys [R, H * W, D], values [R, H * W, D], (H, W)).
Recording = Mapping[str, tuple[Tensor, Tensor, tuple[int, int]]]


def fixed_noise(shape: Sequence[int]) -> Tensor:
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
) -> dict[str, tuple[Tensor, Tensor, tuple[int, int]]]:
    """Reads references [R, C, H, W] once at each noise level; see `Recording`.

    Args:
        unet: the base model's. schedule: its noise schedule.
        latents: clean, scaled as the base model's latents are.
        context: [R, L, D] text context of each reference. y: [R, A] where the base has one.
    """
    wanted = {layer: name for name, layer in layer_modules(unet).items() if name in network.names}
    noise = fixed_noise(latents.shape).to(latents)
    recorded: dict[str, tuple[Tensor, Tensor, tuple[int, int]]] = {}
    for timestep in network.timesteps(schedule.steps):
        steps = torch.full((len(latents),), timestep, device=latents.device)

        def reading(
            layer: Attention, size: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, heads: int
        ) -> Tensor:
            if layer in wanted:
                recorded[site_name(wanted[layer], timestep)] = k, v, size  # noqa: B023
            return layer.attend(q, k, v, heads)

        noised = schedule.noised(latents, noise, steps)
        unet(noised, steps, context, y, self_attention=reading)
    return recorded


def split(
    recorded: Recording,
    masks: Iterable[Tensor | None],
    weights: Sequence[float] | None = None,
    concepts: Sequence[str] | None = None,
) -> list[EncodedReference]:
    """What was recorded as one `EncodedReference` each, tokens wholly outside its mask left out.

    Args:
        masks: one [H, W] mask a reference, of any size, above 0 where it counts; None: all.
        weights: one a reference, 1 by default. concepts: recorded with each reference.

    Raises:
        RetrievalError: a mask selects nothing.
    """
    encoded = []
    for i, mask in enumerate(masks):
        if mask is not None and not bool((mask > 0).any()):
            raise RetrievalError(
                f"The mask of reference {i + 1} selects nothing; select what is to be taken, or "
                "leave the mask out."
            )
        kept: dict[tuple[int, int], Tensor] = {}
        tokens = {}
        for site, (k, v, size) in recorded.items():
            k, v = k[i], v[i]
            if mask is not None:
                if size not in kept:
                    kept[size] = token_mask(mask, *size).flatten().to(k.device)
                k, v = k[kept[size]], v[kept[size]]
            tokens[site] = torch.stack([k, v])
        encoded.append(
            EncodedReference(
                tokens,
                1.0 if weights is None else weights[i],
                "figure" if concepts is None else concepts[i],
            )
        )
    return encoded


def encode(
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
    """`record` and `split`: what `RetrievalControlNet.encode` does, without a trained network.

    Raises:
        RetrievalError: a mask selects nothing.
    """
    recorded = record(unet, schedule, network, latents, context, y)
    return split(recorded, masks or [None] * len(latents), weights, concepts)
