"""Finds near-duplicates: re-encoded, resized and slightly brightened copies of a picture.

A perceptual hash finds candidates, and a small colour thumbnail confirms them, because the hash
knows no colours and hardly notices a garment in another one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Hashes of copies differ in so many of 256 bits at most: fewer than the 16 bands that they are cut
# into, so that copies always have a band in common.
DISTANCE = 15
# A cell of copies' thumbnails differs by so much of 255 at most, once they are equally bright.
LEVELS = 16
_CLIPPED = 240  # cells of brighter parts may have lost some of their brightness
_PAIRS = 1 << 16  # compared at a time
_ONES = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8)).reshape(-1, 16).sum(1)


def find_duplicates(hashes: np.ndarray, thumbnails: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Finds the copies of pictures; of copies the largest is kept, the first of the largest.

    Args:
        hashes: uint8 [N, 32]. thumbnails: uint8 [N, H, W, 3]. pixels: int64 [N], of the pictures.

    Returns:
        int64 [N]: of a copy the kept picture that it is a copy of, else -1.
    """
    order = np.argsort(-pixels, kind="stable")
    bands = np.ascontiguousarray(hashes[order]).view(np.uint16)
    thumbnails = thumbnails[order]
    found = [np.empty((0, 2), np.int64)]
    for band in bands.T:
        for pairs in _pair_equal(band):
            ones = _ONES[bands[pairs[:, 0]] ^ bands[pairs[:, 1]]].sum(1)
            pairs = pairs[ones <= DISTANCE]
            found.append(pairs[look_alike(thumbnails[pairs[:, 0]], thumbnails[pairs[:, 1]])])
    copy_of = np.full(len(order), -1)
    # By the later one of a pair: what comes before it is known to be kept or not.
    for later, earlier in np.unique(np.concatenate(found)[:, ::-1], axis=0).tolist():
        if copy_of[later] < 0 and copy_of[earlier] < 0:
            copy_of[later] = earlier
    result = np.full(len(order), -1)
    result[order] = np.where(copy_of < 0, -1, order[copy_of])
    return result


def look_alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """bool [M], whether thumbnails [M, H, W, 3] differ in brightness only, within `LEVELS`."""
    one, other = one.astype(np.float32), other.astype(np.float32)
    cells = (1, 2, 3)
    swap = one.sum(cells, keepdims=True) > other.sum(cells, keepdims=True)
    dark, bright = np.where(swap, other, one), np.where(swap, one, other)
    whole = bright < _CLIPPED
    gain = (dark * bright * whole).sum(cells) / np.maximum((dark * dark * whole).sum(cells), 1)
    brightened = np.minimum(np.maximum(gain, 1)[:, None, None, None] * dark, 255)
    return np.abs(brightened - bright).max(cells, initial=0) <= LEVELS


def _pair_equal(values: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs (i, j), i < j, of equal values, as int64 [up to about `_PAIRS`, 2] at a time."""
    order = np.argsort(values, kind="stable")
    changes = np.flatnonzero(np.diff(values[order])) + 1
    sizes = np.diff(np.r_[0, changes, len(order)])
    # Each one is paired with those that follow it in its group.
    following = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(order)) - 1
    ends = np.cumsum(following)
    start = 0
    while start < len(order):
        limit = ends[start] + _PAIRS
        stop = max(start + 1, int(np.searchsorted(ends, limit)))
        counts = following[start:stop]
        first = np.repeat(np.arange(start, stop), counts)
        nth = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
        yield np.stack([order[first], order[first + 1 + nth]], 1)
        start = stop
