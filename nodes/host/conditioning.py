"""Text context, latents and vector conditioning by the host's CLIP and VAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.network.unet import timestep_embedding


def encode_text(clip: Any, text: str) -> tuple[Tensor, Tensor | None]:
    """Encodes a text by a CLIP: context [1, L, D], and pooled output [1, P] or None."""
    if clip is None:
        raise RetrievalError(
            "The CLIP input is empty, so the checkpoint holds no text encoder; load one with a "
            "CLIP loader."
        )
    return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


def encode_pixels(vae: Any, images: Tensor, latent_format: Any) -> Tensor:
    """Encodes images [R, S, S, 3] in 0..1 to latents [R, C, h, w], scaled as the base's are."""
    if vae is None:
        raise RetrievalError(
            "The VAE input is empty, so the checkpoint holds no VAE; load one with a VAE loader."
        )
    return latent_format.process_in(vae.encode(images))


def make_vector_conditioning(pooled: Tensor | None, size: int, width: int) -> Tensor:
    """SDXL's vector [1, width] for a square of `size` pixels, neither scaled nor cropped."""
    sizes = timestep_embedding(torch.tensor([size, size, 0, 0, size, size]), 256).flatten()[None]
    found = None if pooled is None else pooled.shape[-1]
    if found != width - sizes.shape[1]:
        raise RetrievalError(
            f"The CLIP given has a pooled output of {found or 'no'} values and the network needs "
            f"{width - sizes.shape[1]}; connect the CLIP of an SDXL checkpoint."
        )
    return torch.cat([pooled.to(sizes), sizes], 1)
