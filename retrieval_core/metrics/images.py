"""The check of a batch of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import RetrievalError


def check_batch(images: Tensor | Sequence[Tensor], what: str = "image", least: int = 1) -> Tensor:
    """Images [N, 3, H, W] of a batch, or of a sequence of [3, H, W] of one size.

    Raises:
        RetrievalError: fewer than `least`, other shapes, or different sizes; `what` names them.
    """
    found = list(images)
    if len(found) < least:
        raise RetrievalError(
            f"There are {len(found)} {what}s and this score needs at least {least}; give a larger "
            "batch."
        )
    for number, image in enumerate(found, 1):
        if image.ndim != 3 or image.shape[0] != 3:
            raise RetrievalError(
                f"The {what} {number} has shape {tuple(image.shape)}; give RGB images "
                "[3, height, width]."
            )
        if image.shape != found[0].shape:
            (h, w), (h0, w0) = image.shape[1:], found[0].shape[1:]
            raise RetrievalError(
                f"The {what} {number} is {w} x {h} pixels and the first is {w0} x {h0}; score "
                "images of one size together."
            )
    return images if isinstance(images, Tensor) else torch.stack(found)
