"""The masked objective (§4.3, eq. 1): the diffusion loss on real content, and again on the face.

    L = mean over content of |prediction - target|^2 + lambda * mean over the face box of the same

Padding is masked out, so that the model does not learn the padding colour.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..sampling.noise_schedule import NoiseSchedule


def average_masked(squares: Tensor, mask: Tensor) -> Tensor:
    """Mean per row of squares [B, C, H, W] weighted by a mask [B, 1, H, W] in 0..1, or 0."""
    weight = mask.expand_as(squares)
    total = (squares * weight).flatten(1).sum(1)
    return total / weight.flatten(1).sum(1).clamp_min(1e-8)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Converts a pixel mask [B, H, W] to the share covered of each latent pixel, [B, 1, h, w]."""
    return F.adaptive_avg_pool2d(mask[:, None].float(), size)


def weigh_timesteps(schedule: NoiseSchedule, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights [B] at timesteps [B] (arXiv 2303.09556), for the schedule's prediction type.

    The weight of the error in x0 is limited to `gamma`: min(SNR, gamma) / SNR for eps, and
    min(SNR, gamma) / (SNR + 1) for v.
    """
    abar = schedule.alphas_cumprod()[timesteps.cpu()]
    snr = abar / (1 - abar)
    return snr.clamp_max(gamma) / (snr if schedule.prediction == "eps" else snr + 1)


def weigh_squares(
    error: Tensor, channel_weights: Tensor | None, row_weights: Tensor | None
) -> Tensor:
    """Squares of errors [B, C, H, W] times weights [C] and [B], where there are any."""
    squares = error.square()
    if channel_weights is not None:
        squares = squares * channel_weights.to(squares).view(1, -1, 1, 1)
    if row_weights is not None:
        squares = squares * row_weights.to(squares).view(-1, 1, 1, 1)
    return squares


def retrieval_loss(
    prediction: Tensor,
    target: Tensor,
    content: Tensor | None = None,
    face: Tensor | None = None,
    face_weight: float = 1.0,
    channel_weights: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Equation 1 and its two terms.

    Args:
        prediction, target: [B, C, H, W], eps or v (`NoiseSchedule.target`).
        content: [B, 1, H, W], 1 on the target image, 0 in its padding.
        face: [B, 1, H, W], 1 in the face box; all 0 for rows without a face.
        face_weight: lambda.
        channel_weights: [C], weight of the error in each latent channel; None: all 1.
        row_weights: [B], weight of each row (`weigh_timesteps`); None: all 1.

    Returns:
        Scalars "loss", "content" and, with a face, "face".
    """
    squares = weigh_squares(prediction - target, channel_weights, row_weights)
    whole = squares.mean() if content is None else average_masked(squares, content).mean()
    if face is None or face_weight == 0:
        return {"loss": whole, "content": whole.detach()}
    inner = average_masked(squares, face).mean()
    loss = whole + face_weight * inner
    return {"loss": loss, "content": whole.detach(), "face": inner.detach()}
