"""A retrieval map as the host's IMAGE and MASK."""

from __future__ import annotations

import torch
from torch import Tensor

from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.sampling.attention_map import draw_overlay, make_reference_masks
from ...retrieval_core.sheets import choose_colour
from .recorder import Recorder


def draw_map(
    recorder: Recorder, images: Tensor, hard: bool, reference: int
) -> tuple[Tensor, Tensor]:
    """Draws the overlay [B, H, W, 3] and masks [B * references, H, W], or [B, H, W] of one.

    Args:
        images: [B, H, W, 3] in 0..1, the pictures of the recorded run.
        hard: see `make_reference_masks`. reference: from 1, or 0 for all of them.

    Raises:
        RetrievalError: no run was recorded, another number of pictures, or no such reference.
    """
    if not recorder.runs:
        raise RetrievalError(
            "No sampler has filled the retrieval map yet; sample with the model that Record "
            "Retrieval Map gives, and if the host kept an older picture, change the seed."
        )
    pictures = images[..., :3].movedim(-1, 1).float().cpu()
    shares = recorder.shares()
    count, (height, width) = len(pictures), pictures.shape[-2:]
    if shares is None:
        grey = pictures.mean(1, keepdim=True).expand_as(pictures)
        return grey.movedim(1, -1).contiguous(), torch.zeros(count, height, width)
    if len(shares) != count:
        raise RetrievalError(
            f"The retrieval map is of {len(shares)} pictures and {count} were given; connect all "
            "pictures of the sampler that the map was recorded with."
        )
    references = shares.shape[1] - 1
    if reference > references:
        raise RetrievalError(
            f"The masks of reference {reference} were asked for and there are {references}; give 1 "
            f"to {references}, or 0 for all."
        )
    tinted = draw_overlay(pictures, shares, [choose_colour(i) for i in range(references)])
    masks = make_reference_masks(shares, height, width, hard)
    chosen = masks[:, reference - 1] if reference else masks.flatten(0, 1)
    return tinted.movedim(1, -1).contiguous(), chosen.contiguous()
