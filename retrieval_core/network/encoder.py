"""The retrieval encoder E (§4.1): the U-Net's encoder half, applied to clean reference latents."""

from __future__ import annotations

import torch
from torch import Tensor

from .unet import UNetEncoder


class RetrievalEncoder(UNetEncoder):
    """A copy of the base U-Net's time embedding, encoder and middle block.

    Its inputs are the clean VAE latent of a reference, timestep 0, and a text context that says
    what to take from the reference ("face", "clothes", "figure", or tags).
    """

    def forward(
        self, latents: Tensor, context: Tensor, y: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Features f_s of every site.

        Args:
            latents: [R, C, H, W], scaled as the base model's latents are. For an inpainting base
                (2 C + 1 input channels) an empty mask and the latents themselves are appended.
            context: [R, L, D] text context of each reference.
            y: [R, A] vector conditioning where the base has one (SDXL).

        Returns:
            site -> [R, C_s, H_s, W_s].
        """
        if self.config.in_channels == 2 * latents.shape[1] + 1:
            latents = torch.cat([latents, torch.zeros_like(latents[:, :1]), latents], 1)
        timesteps = torch.zeros(latents.shape[0], device=latents.device)
        emb = self.embed(timesteps, y, latents.dtype)
        features = self.encode(latents, emb, context)
        return dict(zip(self.config.site_channels(), features, strict=True))
