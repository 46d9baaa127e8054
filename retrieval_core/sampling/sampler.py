"""DDIM and DPM++ 2M sampling with classifier-free guidance and retrieval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import RetrievalError
from ..network.unet import UNet
from .applications import Application, Applications
from .noise_schedule import NoiseSchedule

Sampler = Literal["dpmpp_2m", "ddim"]
Denoise = Callable[[Tensor, int], Tensor]


def make_guided_denoiser(
    unet: UNet,
    schedule: NoiseSchedule,
    cond: Tensor,
    uncond: Tensor,
    cfg: float,
    applications: Sequence[Application] = (),
) -> Denoise:
    """Builds the x0-prediction with classifier-free guidance: uncond + cfg * (cond - uncond).

    Args:
        unet: the base model, or with retrieval the one with the trained decoder
            (`apply_decoder`).
        cond, uncond: text contexts [B, L, D].
        cfg: guidance scale; at 1 only the conditional rows are computed.
        applications: of references; their `guidance` says which rows retrieve.

    Returns:
        A function of the noised latent x [B, C, H, W] (sigma space) and the timestep.
    """
    sigmas, applied = schedule.sigmas(), Applications(applications)
    chunks = 1 if cfg == 1.0 else 2
    context = torch.cat([cond, uncond][:chunks])

    def denoise(x: Tensor, timestep: int) -> Tensor:
        sigma = sigmas[timestep]
        scaled = (x / (1 + sigma**2).sqrt()).to(x.dtype)
        rows = torch.cat([scaled] * chunks)
        steps = torch.full((rows.shape[0],), timestep, device=x.device)
        progress = 1 - timestep / (schedule.steps - 1)
        hooks = applied.hooks(range(chunks), progress)
        prediction, text, sigma = unet(rows, steps, context, **hooks), None, sigma.expand(len(x))
        if chunks == 2:
            positive, negative = prediction.chunk(2)
            prediction = negative + cfg * (positive - negative)
            text = schedule.denoised(positive, x, sigma) - schedule.denoised(negative, x, sigma)
        return applied.shift(schedule.denoised(prediction, x, sigma), text, progress)

    return denoise


@torch.inference_mode()
def sample(
    denoise: Denoise,
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: int = 20,
    sampler: Sampler = "dpmpp_2m",
) -> Tensor:
    """Samples a latent from unit noise [B, C, H, W]; deterministic given the noise.

    `ddim` is eta = 0, which in sigma space is an Euler step; `dpmpp_2m` is DPM-Solver++(2M) (arXiv
    2211.01095, algorithm 2).

    Raises:
        RetrievalError: fewer than one step, or as many as the schedule has.
    """
    if not 1 <= steps < schedule.steps:  # `schedule.steps` of them would visit a timestep twice
        raise RetrievalError(
            f"Sampling with {steps} steps is not possible; give between 1 and {schedule.steps - 1}."
        )
    timesteps = schedule.timesteps(steps).tolist()
    sigmas = [float(s) for s in schedule.sigmas()[timesteps]] + [0.0]
    x = noise * (1 + sigmas[0] ** 2) ** 0.5
    previous: Tensor | None = None
    for i, timestep in enumerate(timesteps):
        x0 = denoise(x, timestep)
        sigma, following = sigmas[i], sigmas[i + 1]
        ratio = following / sigma
        if sampler == "ddim" or previous is None or following == 0:
            direction = x0
        else:
            # h = log(sigma_i / sigma_i+1); r = h_last / h, the ratio of the two step lengths.
            r = math.log(sigmas[i - 1] / sigma) / math.log(sigma / following)
            direction = (1 + 1 / (2 * r)) * x0 - (1 / (2 * r)) * previous
        x = ratio * x + (1 - ratio) * direction
        previous = x0
    return x
