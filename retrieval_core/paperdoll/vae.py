"""The paper-doll world's VAE: a fixed linear transform of square patches of pixels, fitted once.

Each patch is projected on the principal components of the world's patches. Components are scaled by
std ** -0.5, so that colours keep a larger variance than fine edges, and both stay above the
diffusion noise. The basis is orthonormal, so decoding multiplies with its transpose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 4  # edge in pixels, of the bundled base


class PatchVAE(nn.Module):
    """Encodes images [B, 3, H, W] in 0..1 to latents [B, C, H / p, W / p] and back.

    patch: edge p of a patch in pixels. Buffers, with V = 3 p^2 values in a patch: `basis` [C, V]
    orthonormal rows, `mean` [V], `scale` [C] of the projections.
    """

    basis: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, channels: int, patch: int = PATCH):
        super().__init__()
        values = 3 * patch * patch
        self.channels, self.patch = channels, patch
        self.register_buffer("basis", torch.zeros(channels, values))
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("scale", torch.ones(channels))

    @classmethod
    def fit(cls, images: Tensor, channels: int, patch: int = PATCH) -> PatchVAE:
        """The transform for images [N, 3, H, W] in 0..1; deterministic up to rounding."""
        vae = cls(channels, patch)
        patches = F.pixel_unshuffle(images.double(), patch).movedim(1, -1).flatten(0, -2)
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        basis = vectors.T.flip(0)[:channels]
        signs = basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
        stds = values.flip(0)[:channels].clamp_min(1e-8).sqrt()
        vae.basis.copy_(basis * signs)
        vae.mean.copy_(mean)
        # The first component's latents have a standard deviation of p / 2, so that a noise level
        # hides an area equally well at any p; the others' have a lower one.
        vae.scale.copy_(patch / 2 / (stds[0].sqrt() * stds.sqrt()))
        return vae

    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, C, H / p, W / p] of images [B, 3, H, W] in 0..1; H, W multiples of p."""
        patches = F.pixel_unshuffle(images, self.patch) - self.mean[:, None, None]
        return F.conv2d(patches, (self.basis * self.scale[:, None])[:, :, None, None])

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, p h, p w] in 0..1 of latents [B, C, h, w]."""
        weights = (self.basis / self.scale[:, None]).T[:, :, None, None]
        patches = F.conv2d(latents, weights) + self.mean[:, None, None]
        return F.pixel_shuffle(patches, self.patch).clamp(0, 1)
