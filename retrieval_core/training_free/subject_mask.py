"""Subject masks of references, from the self-attention keys that encoding records anyway.

A guess by position alone, that a subject lies away from the picture's upper, left and right edges,
is diffused over the similarity of keys: what resembles the middle more than the edges becomes the
subject, also where it touches an edge (biased normalised cuts, Maji et al., CVPR 2011; TokenCut,
arXiv 2202.11539). Attention between pixels by colour and position then gives the mask its edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank.encoding import Features

MOST_TOKENS = 32 * 32  # of a layer that is asked; finer layers tell textures, not things
CHANNELS = 256  # of keys; more tell no more of their similarity
STEPS = 2  # of diffusion
PIXELS, CELL = 64, 4  # edge of the picture whose colours are compared, and of its cells
COLOUR, POSITION = 0.03, 0.2  # standard deviations: of 0..1, and of the picture's edge
SHARPNESS = 4.0  # logits of a standard deviation of the map
EDGE_WEIGHT = 10.0  # of cells at the picture's edges, as far as they are background
# Largest variance within subject and background, as a share of the map's, that counts as found.
MOST_WITHIN = 0.18
LEAST_AREA, MOST_AREA = 0.02, 0.95
# Share of a token that must be subject (`select_tokens`): those at the subject's edges have read
# the background too, which a mask given beforehand would have filled.
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
    layers, (height, width) = _choose_layers(features)
    images = images.float().cpu()
    return [
        _find_subject([_thin(keys[i, 0]) for keys in layers], (height, width), image, contents[i])
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


def _thin(keys: Tensor) -> Tensor:
    """About `CHANNELS` of the channels of keys [N, D], float32 on the CPU."""
    return keys[:, :: max(1, keys.shape[1] // CHANNELS)].cpu().float()


def _find_subject(
    layers: Sequence[Tensor], size: tuple[int, int], image: Tensor, content: Tensor | None
) -> Tensor | None:
    """`find_subjects` of one reference, from keys [N, D] of layers of height x width tokens."""
    inside = torch.ones(image.shape[1:]) if content is None else content
    small = _pool(inside, (PIXELS, PIXELS))
    depth = _measure_depth(small > 0.5)
    shown = _diffuse(layers, _pool(inside, size), _pool(depth, size))
    shown = _draw_edges(shown, _pool(image, (PIXELS, PIXELS)), small, depth)
    values = shown[small > 0.5][::5]
    if len(values) < 2:
        return None
    threshold, within = _split(values)
    if shown.shape != inside.shape:
        shown = F.interpolate(shown[None, None], inside.shape, mode="bilinear")[0, 0]
    mask = (shown > threshold) & (inside > 0)
    area = mask.sum() / (inside > 0).sum()
    return mask if within < MOST_WITHIN and LEAST_AREA < area < MOST_AREA else None


def _diffuse(layers: Sequence[Tensor], inside: Tensor, depth: Tensor) -> Tensor:
    """The map of the subject [h, w], of mean square 1 and 0 in the padding.

    Args:
        inside, depth: of the layers' tokens [h, w], see `_measure_depth`.
    """
    weight = inside.flatten()
    centred = [(k - (weight @ k) / weight.sum()) * weight[:, None] for k in layers]
    keys = torch.cat([k / k.norm().clamp_min(1e-12) for k in centred], 1)
    shown = depth.flatten()
    shown = weight * (shown - (weight @ shown) / weight.sum())
    for _ in range(STEPS):
        shown = keys @ (shown @ keys)
    return (shown / shown.square().mean().sqrt().clamp_min(1e-12)).view_as(inside)


def _measure_depth(inside: Tensor) -> Tensor:
    """The distance of each pixel [h, w] to the nearest of the upper, left and right edges of what
    is inside, in shares of its height or width."""
    down, right = (inside.any(axis).cumsum(0) - 0.5 for axis in (1, 0))
    down, right = down / (down[-1] + 0.5), right / (right[-1] + 0.5)
    return torch.minimum(down[:, None], torch.minimum(right, 1 - right)).clamp_min(0)


def _draw_edges(shown: Tensor, image: Tensor, inside: Tensor, depth: Tensor) -> Tensor:
    """The map [h, w] as a share of subject in 0..1 [P, P], with the edges of the image [3, P, P].

    One pixel of each cell attends to those of all cells by colour and position; then every pixel
    attends to those of its own and the eight cells around it.

    Args:
        inside, depth: [P, P], see `_measure_depth`.
    """
    place = (torch.arange(PIXELS) + 0.5) / (PIXELS * POSITION)
    right = place.expand(PIXELS, -1)
    pixels = torch.cat([image / COLOUR, torch.stack([right.T, right])])
    middle = slice(CELL // 2, None, CELL)
    inside, depth = inside[middle, middle], depth[middle, middle]
    share = F.interpolate(shown[None, None], inside.shape, mode="bilinear")[0, 0]
    share = (SHARPNESS * share).sigmoid()
    edge = depth * len(inside) < 1
    weight = inside * (1 + EDGE_WEIGHT * edge * (1 - share))
    cells = pixels[:, middle, middle].flatten(1)
    square = cells.square().sum(0) / 2
    attention = torch.addmm(weight.flatten().log() - square, cells.T, cells).softmax(1)
    share = attention @ share.flatten()
    bias = (inside > 0.5).flatten().float().log() - square
    around = torch.cat([cells, bias[None], share[None]]).view(1, -1, *inside.shape)
    around = F.unfold(F.pad(around, (1, 1, 1, 1), mode="replicate"), 3)
    around = around.view(len(pixels) + 2, 9, -1, 1)
    own = pixels.unflatten(1, (-1, CELL)).unflatten(3, (-1, CELL)).transpose(2, 3)
    own = own.reshape(len(pixels), 1, -1, CELL**2)
    attention = (around[-2] + (around[:-2] * own).sum(0)).softmax(0)
    drawn = (attention * around[-1]).sum(0)
    drawn = drawn.view(*inside.shape, CELL, CELL).transpose(1, 2)
    return drawn.reshape(PIXELS, PIXELS)


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """The threshold between two groups of values [N] (Otsu, 1979), and the share of the variance
    within both."""
    ordered = values.sort().values
    count = torch.arange(1, len(values))
    below, total = ordered.cumsum(0)[:-1], ordered.sum()
    between = (below * len(values) - count * total).square() / (count * (len(values) - count))
    best = between.argmax()
    variance = ordered.var(correction=0) * len(values) ** 2
    return (ordered[best] + ordered[best + 1]) / 2, 1 - between[best] / variance.clamp_min(1e-12)


def _pool(values: Tensor, size: Sequence[int]) -> Tensor:
    """Means of values [..., H, W] on a grid of another size."""
    if values.shape[-2:] == tuple(size):
        return values
    return F.adaptive_avg_pool2d(values[None], size)[0]
