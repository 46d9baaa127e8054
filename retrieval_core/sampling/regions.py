"""Where in the picture references may appear: masks with soft edges, at any site's resolution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RetrievalError


def resize_region(region: Tensor, h: Tensor) -> Tensor:
    """A region [H, W] at the features' resolution [1, 1, h, w], edges kept soft."""
    region = region.to(h.device, torch.float32)[None, None]  # halves have no antialiasing on CPUs
    return F.interpolate(region, size=h.shape[-2:], mode="bilinear", antialias=True).to(h)


def find_active(region: Tensor, pool: int = 1) -> Tensor | None:
    """[Q]: which of a site's queries count within a region [1, 1, h, w]; None for all of them.

    Args:
        pool: query pooling factor; positions between two pooled queries need both.
    """
    inside = (region > 0).float()
    if pool > 1:
        inside = F.max_pool2d(inside, pool, ceil_mode=True)
        inside = F.max_pool2d(inside, 3, stride=1, padding=1)
    inside = inside.flatten() > 0
    return None if bool(inside.all()) else inside.nonzero()[:, 0]


def soften(region: Tensor, radius: float) -> Tensor:
    """A region [H, W] with its edges blurred by a Gaussian; beyond its border it goes on.

    Args:
        radius: standard deviation of the blur in the region's pixels; 0 leaves it as it is.

    Raises:
        RetrievalError: a radius that is negative or not finite.
    """
    if not math.isfinite(radius) or radius < 0:
        raise RetrievalError(
            f"The region blur is {radius}; give 0 pixels (edges as painted) or more."
        )
    if radius == 0:
        return region
    # Enough of the bell to hold 99.7 % of it, and no more than the region has.
    reach = min(math.ceil(3 * radius), max(region.shape))
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    bell = torch.exp(-0.5 * (places / radius) ** 2)
    bell = (bell / bell.sum()).to(torch.float32)
    soft = region.to(torch.float32)[None, None]
    for kernel in (bell.view(1, 1, 1, -1).to(soft), bell.view(1, 1, -1, 1).to(soft)):
        across = kernel.shape[-1] > 1
        pad = (reach, reach, 0, 0) if across else (0, 0, reach, reach)
        soft = F.conv2d(F.pad(soft, pad, mode="replicate"), kernel)
    return soft[0, 0].clamp(0, 1).to(region)
