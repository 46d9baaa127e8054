"""SDXL's vector conditioning from the pooled output of the host's CLIP."""

from __future__ import annotations

import torch
from torch import Tensor

from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.network.unet import timestep_embedding


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
