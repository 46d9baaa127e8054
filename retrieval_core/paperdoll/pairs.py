"""Pairs of rows as halves of one picture, which trains a network to keep characters apart.

Rows are G groups of T, one bank per group. Row t of group 2g is the left half and row t of group
2g + 1 the right half of a picture twice as wide.
"""

from __future__ import annotations

from einops import rearrange, repeat
from torch import Tensor


def join_halves(rows: Tensor, groups: int) -> Tensor:
    """Rows [G * T, C, H, W] as pictures [G / 2 * T, C, H, 2 * W]."""
    return rearrange(rows, "(g s t) c h w -> (g t) c h (s w)", g=groups // 2, s=2)


def split_halves(pictures: Tensor, groups: int) -> Tensor:
    """The inverse of `join_halves`."""
    return rearrange(pictures, "(g t) c h (s w) -> (g s t) c h w", g=groups // 2, s=2)


def take_left(values: Tensor, groups: int) -> Tensor:
    """The left halves' values of one value per row: [G * T, ...] -> [G / 2 * T, ...]."""
    return values.unflatten(0, (groups // 2, 2, -1))[:, 0].flatten(0, 1)


def copy_left_to_right(values: Tensor, groups: int) -> Tensor:
    """One value per row [G * T, ...], the right halves' replaced by the left ones'."""
    left = take_left(values, groups)
    return repeat(left, "(g t) ... -> (g s t) ...", g=groups // 2, s=2)
