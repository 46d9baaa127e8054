"""Two rows as the halves of one picture, so that a network learns to keep characters apart.

Rows are G groups of T, each group with a bank of its own; rows of the groups 2g and 2g + 1 share a
picture twice as wide, the first of them its left half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..network.unet import SkipHook


def join_halves(rows: Tensor, groups: int) -> Tensor:
    """Rows [G * T, C, H, W] as pictures [G / 2 * T, C, H, 2 * W]."""
    left, right = rows.unflatten(0, (groups // 2, 2, -1)).unbind(1)
    return torch.cat([left, right], -1).flatten(0, 1)


def split_halves(pictures: Tensor, groups: int) -> Tensor:
    """The inverse of `join_halves`."""
    halves = pictures.unflatten(0, (groups // 2, -1)).chunk(2, -1)
    return torch.stack(halves, 1).flatten(0, 2)


def take_left(values: Tensor, groups: int) -> Tensor:
    """Of one value a row [G * T, ...] those of the left halves, [G / 2 * T, ...]."""
    return values.unflatten(0, (groups // 2, 2, -1))[:, 0].flatten(0, 1)


def copy_left_to_right(values: Tensor, groups: int) -> Tensor:
    """One value a row [G * T, ...], the right halves' replaced by the left ones'."""
    left = values.unflatten(0, (groups // 2, 2, -1))[:, :1]
    return left.expand(-1, 2, *left.shape[2:]).flatten(0, 2)


def hook_halves(hook: SkipHook, groups: int) -> SkipHook:
    """A hook of pictures that sends their halves, as rows, through a hook of rows."""

    def picture_hook(site: str, h: Tensor) -> Tensor:
        return join_halves(hook(site, split_halves(h, groups)), groups)

    return picture_hook
