"""Subject masks of references, from the self-attention keys that encoding records anyway.

A guess by position alone, that a subject lies away from the picture's upper, left and right edges,
is diffused over the similarity of keys: what resembles the middle more than the edges becomes the
subject, also where it touches an edge (biased normalised cuts, Maji et al., CVPR 2011; TokenCut,
arXiv 2202.11539). Attention between pixels by colour and position then gives the mask its edges.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank.encoding import Features

MOST_TOKENS = 32 * 32  # of a layer that is asked; finer layers tell textures, not things
CHANNELS = 256  # of keys; more tell no more of their similarity
STEPS = 2  # of diffusion
PIXELS, CELL = 64, 4  # edge of the picture whose colours are compared, and of its cells
CELLS = PIXELS // CELL
COLOUR, POSITION = 0.03, 0.2  # standard deviations: of 0..1, and of the picture's edge
SHARPNESS = 4.0  # logits of a standard deviation of the map
EDGE_WEIGHT = 10.0  # of cells at the picture's edges, as far as they are background
# Largest variance within subject and background, as a share of the map's, that counts as found.
MOST_WITHIN = 0.22
LEAST_AREA, MOST_AREA = 0.02, 0.95
# Share of a token that must be subject (`select_tokens`): a mask found keeps some background at the
# subject's edges.
LEAST_COVERED = 0.3


def find_subjects(
    features: Features, images: Tensor, contents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Finds the subject of each reference.

    Args:
        features: of `record`. images: [R, 3, S, S] in 0..1, the references without a mask.
        contents: [S, S] of each, 0 in the padding of pictures that are not square, or None.

    Returns:
        bool [S, S], False in the padding; None where no subject stands out from a background: there
        is none, it fills the picture, or the picture is too unlike what the base model knows.
    """
    layers, size = _choose_layers(features)
    images = images.float().cpu()
    return [
        _find_subject([_read_keys(keys[i]) for keys in layers], size, image, contents[i])
        for i, image in enumerate(images)
    ]


def _choose_layers(features: Features) -> tuple[list[Tensor], tuple[int, int]]:
    """The last layer of each block of the finest size that tells things apart, in the decoder if
    any was recorded there, at the lowest noise level, and that size."""
    lowest = min(int(site.rpartition("@")[2]) for site in features)
    sites = [site for site in features if site.endswith(f"@{lowest}")]
    sites = [site for site in sites if site.startswith("output_")] or sites
    last = {site.partition(".")[0]: features[site] for site in sites}  # in the order they run in
    sizes = [size for _, size in last.values()]
    size = max((s for s in sizes if math.prod(s) <= MOST_TOKENS), default=min(sizes))
    return [keys for keys, given in last.values() if given == size], size


def _read_keys(tokens: Tensor) -> np.ndarray:
    """About `CHANNELS` channels of the keys of tokens [2, N, D], float32."""
    return tokens[0, :, :: max(1, tokens.shape[2] // CHANNELS)].cpu().float().numpy()


def _find_subject(
    layers: Sequence[np.ndarray], size: tuple[int, int], image: Tensor, content: Tensor | None
) -> Tensor | None:
    """`find_subjects` of one reference, from keys [N, D] of layers of height x width tokens."""
    inside, cells = np.ones(size, bool), np.ones((CELLS, CELLS), bool)
    if content is not None:
        inside, cells = (_pool(content, shape).numpy() > 0.5 for shape in (size, cells.shape))
    if not (inside.any() and cells.any()):
        return None
    shares = 1 / (1 + np.exp(-SHARPNESS * _diffuse(layers, inside)))
    by_cell, shown = _draw_edges(shares, _pool(image, (PIXELS, PIXELS)).numpy(), cells)
    threshold, within = _split(by_cell[cells.ravel()])
    if shown.shape != image.shape[1:]:
        large = torch.from_numpy(shown)[None, None]
        shown = F.interpolate(large, image.shape[1:], mode="bilinear")[0, 0].numpy()
    mask, area = shown > threshold, 1.0
    if content is not None:
        picture = content.numpy() > 0
        mask, area = mask & picture, picture.mean()
    if within < MOST_WITHIN and LEAST_AREA < mask.mean() / area < MOST_AREA:
        return torch.from_numpy(mask)
    return None


def _diffuse(layers: Sequence[np.ndarray], inside: np.ndarray) -> np.ndarray:
    """The map of the subject [h, w], of mean square 1 and 0 outside `inside`, bool [h, w]."""
    weight = inside.ravel() / np.float32(inside.sum())
    keys = np.concatenate(layers, 1)
    keys = (keys - weight @ keys) * weight[:, None]
    shown = _measure_depth(inside).ravel()
    for _ in range(STEPS):
        shown = keys @ (shown @ keys)
    shown *= len(shown) ** 0.5 / max(float(np.linalg.norm(shown)), 1e-30)
    return shown.reshape(inside.shape)


def _measure_depth(inside: np.ndarray) -> np.ndarray:
    """The distance of each place [h, w] to the nearest of the upper, left and right edges of what
    is inside, in shares of its height or width."""
    down, right = (inside.any(axis).cumsum(dtype=np.float32) for axis in (1, 0))
    down, right = (down - 0.5) / down[-1], (right - 0.5) / right[-1]
    return np.minimum(down[:, None], np.minimum(right, 1 - right)).clip(0)


def _draw_edges(
    shares: np.ndarray, image: np.ndarray, inside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of subject in 0..1 [h, w] with the edges of the image [3, P, P].

    One pixel of each cell attends to those of all cells by colour and position; then every pixel
    attends to those of its own and the eight cells around it.

    Args:
        inside: of the cells [C, C]; others are not attended to.

    Returns:
        The cells' shares [C * C], and the pixels' [P, P].
    """
    places, around = _lay_out()
    pixels = np.concatenate([image / np.float32(COLOUR), places])
    cells = pixels[:, CELL // 2 :: CELL, CELL // 2 :: CELL].reshape(len(pixels), -1)
    square = (cells * cells).sum(0) / 2
    down, right = (_make_resizing(count) for count in shares.shape)
    share, inside = (down @ shares @ right.T).ravel(), inside.astype(np.float32)
    edge = _measure_depth(inside > 0).ravel() * CELLS < 1
    weight = inside.ravel() * np.where(edge, 1 + EDGE_WEIGHT * (1 - share), 1)
    attention = cells.T.copy() @ cells
    attention -= square
    attention -= square[:, None]
    np.exp(attention, out=attention)  # in place: new pages of memory take longer
    attention *= weight.astype(np.float32)
    share = attention @ share / attention.sum(1).clip(1e-30)
    own = pixels.reshape(-1, CELLS, CELL, CELLS, CELL).transpose(1, 3, 0, 2, 4)
    own = own.reshape(CELLS**2, len(pixels), CELL**2)
    logits = (cells.T[around] @ own).swapaxes(0, 1).copy()  # [9, cells, pixels of a cell]
    around = around.T
    logits -= square[around][..., None]
    logits -= logits.max(0)
    attention = np.exp(logits, out=logits)
    attention *= inside.ravel()[around][..., None]
    drawn = (attention * share[around][..., None]).sum(0) / attention.sum(0).clip(1e-30)
    drawn = drawn.reshape(CELLS, CELLS, CELL, CELL).swapaxes(1, 2)
    return share, drawn.reshape(PIXELS, PIXELS)


@functools.cache
def _lay_out() -> tuple[np.ndarray, np.ndarray]:
    """Column and row of each pixel [2, P, P], in units of `POSITION`; and the indices of each
    cell's neighbours and itself [C * C, 9]."""
    place = (np.arange(PIXELS, dtype=np.float32) + 0.5) / (PIXELS * POSITION)
    places = np.stack(np.meshgrid(place, place)).astype(np.float32)
    rows, columns = np.indices((CELLS, CELLS)).reshape(2, -1, 1)
    down, right = np.indices((3, 3)).reshape(2, 1, -1) - 1
    around = (rows + down).clip(0, CELLS - 1) * CELLS + (columns + right).clip(0, CELLS - 1)
    return places, around


@functools.cache
def _make_resizing(count: int) -> np.ndarray:
    """Weights [C, count] that resize an axis of `count` values to the cells, linearly."""
    position = ((np.arange(CELLS) + 0.5) * count / CELLS - 0.5).clip(0, count - 1)
    return (1 - abs(position[:, None] - np.arange(count))).clip(0).astype(np.float32)


def _split(values: np.ndarray) -> tuple[float, float]:
    """The threshold between two groups of values [N] (Otsu, 1979), and the share of the variance
    within both."""
    ordered = np.sort(values).astype(np.float64)
    below, above = np.arange(1, len(ordered)), np.arange(len(ordered) - 1, 0, -1)
    sums = ordered.cumsum()
    between = (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2 * below * above
    best = int(between.argmax())
    within = 1 - between[best] / (ordered.var() * len(ordered) ** 2 + 1e-12)
    return float(ordered[best] + ordered[best + 1]) / 2, within


def _pool(values: Tensor, size: Sequence[int]) -> Tensor:
    """Means of values [..., H, W] on a grid of another size."""
    if values.shape[-2:] == tuple(size):
        return values
    return F.adaptive_avg_pool2d(values[None], size)[0]
