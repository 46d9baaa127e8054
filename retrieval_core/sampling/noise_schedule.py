"""The noise schedule of Stable Diffusion and the two prediction types, in sigma space.

x = x0 + sigma * eps is the noised latent, sigma^2 = (1 - abar) / abar; the network reads
x / sqrt(1 + sigma^2), which is sqrt(abar) x0 + sqrt(1 - abar) eps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["eps", "v"]


def _per_row(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like).view(-1, *[1] * (like.ndim - 1))


# abar at the last timestep with zero terminal SNR: ComfyUI's value, which keeps sigma finite.
_TERMINAL = 4.8973451890853435e-08


@dataclass(frozen=True)
class NoiseSchedule:
    """Scaled-linear betas over `steps` training timesteps (SD 1.x, 2.x and SDXL's values).

    zero_terminal_snr: sqrt(abar) is shifted and scaled so that the last timestep is noise alone
        (arXiv 2305.08891, algorithm 1); for "v", as noise says nothing of eps.
    """

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: Prediction = "eps"
    zero_terminal_snr: bool = False

    def alphas_cumprod(self) -> Tensor:
        """abar_t, float64 [steps]."""
        edges = self.beta_start**0.5, self.beta_end**0.5
        betas = torch.linspace(*edges, self.steps, dtype=torch.float64) ** 2
        abar = torch.cumprod(1.0 - betas, 0)
        if self.zero_terminal_snr:
            signal = abar.sqrt()
            signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
            abar = signal.square().clamp_min(_TERMINAL)
        return abar

    def sigmas(self) -> Tensor:
        """sigma_t, float64 [steps], rising."""
        abar = self.alphas_cumprod()
        return ((1 - abar) / abar).sqrt()

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar) at timesteps [B], for rows like `like`."""
        abar = self.alphas_cumprod()[timesteps.cpu()]
        return _per_row(abar.sqrt(), like), _per_row((1 - abar).sqrt(), like)

    def noised(self, x0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """The network's input sqrt(abar) x0 + sqrt(1 - abar) eps at timesteps [B]."""
        signal, noise = self._levels(timesteps, x0)
        return signal * x0 + noise * eps

    def target(self, x0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """The network's target: eps, or v = sqrt(abar) eps - sqrt(1 - abar) x0."""
        if self.prediction == "eps":
            return eps
        signal, noise = self._levels(timesteps, x0)
        return signal * eps - noise * x0

    def clean(self, prediction: Tensor, noised: Tensor, timesteps: Tensor) -> Tensor:
        """x0 from the network's prediction at `noised`, its input, at timesteps [B]."""
        signal, noise = self._levels(timesteps, noised)
        if self.prediction == "eps":
            return (noised - noise * prediction) / signal
        return signal * noised - noise * prediction

    def denoised(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """x0 from the network's prediction at the noised latent x = x0 + sigma eps; sigma [B]."""
        sigma = _per_row(sigma, x)
        if self.prediction == "eps":
            return x - sigma * prediction
        return x / (1 + sigma**2) - prediction * sigma / (1 + sigma**2).sqrt()

    def timesteps(self, count: int) -> Tensor:
        """`count` evenly spaced timesteps (int64) for sampling, from the noisiest downwards."""
        return torch.linspace(self.steps - 1, 0, count + 1).round().long()[:-1]
