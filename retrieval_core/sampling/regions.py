"""Regions of the picture that references act in: soft masks, at any site's resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_region(region: Tensor, h: Tensor) -> Tensor:
    """Resizes a region [H, W] to the features' resolution, [1, 1, h, w]; its edges stay soft."""
    region = region.to(h.device, torch.float32)[None, None]  # halves have no antialiasing on CPUs
    return F.interpolate(region, size=h.shape[-2:], mode="bilinear", antialias=True).to(h)


def add_shifts(x: Tensor, shifts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """x [B, C, H, W] with each shift added inside its region [h, w], None for everywhere.

    Where overlapping regions sum to more than 1, they are scaled down to a sum of 1.
    """
    if not shifts:
        return x
    everywhere = x.new_ones(1, 1, *x.shape[-2:])
    regions = [everywhere if r is None else resize_region(r, x) for _, r in shifts]
    total = sum(regions).clamp_min(1)
    moved = sum(shift * (r / total) for (shift, _), r in zip(shifts, regions, strict=True))
    return x + moved.to(x)


def find_active(region: Tensor, pool: int = 1) -> Tensor | None:
    """Indices [Q] of a site's queries that a region [1, 1, h, w] needs; None for all of them.

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
    """Blurs a region [H, W] by a Gaussian; border values are repeated outwards.

    Args:
        radius: standard deviation in the region's pixels; 0 returns the region itself.
    """
    if radius == 0:
        return region
    # Three deviations hold 99.7 % of the Gaussian.
    reach = min(math.ceil(3 * radius), max(region.shape))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    bell = torch.exp(-0.5 * (offsets / radius) ** 2)
    bell = (bell / bell.sum()).to(torch.float32)
    soft = region.to(torch.float32)[None, None]
    for kernel in (bell.view(1, 1, 1, -1).to(soft), bell.view(1, 1, -1, 1).to(soft)):
        across = kernel.shape[-1] > 1
        pad = (reach, reach, 0, 0) if across else (0, 0, reach, reach)
        soft = F.conv2d(F.pad(soft, pad, mode="replicate"), kernel)
    return soft[0, 0].clamp(0, 1).to(region)
