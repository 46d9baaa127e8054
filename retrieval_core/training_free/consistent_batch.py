"""Consistent pictures without a reference: pictures of a batch share their subject while drawn.

At the inputs of decoder blocks above the coarsest resolution, each position p of a picture i that
shows its subject takes the features of the positions q of the other pictures j that correspond to
it, as ConsiStory's feature injection does with the output of self-attention (arXiv 2402.03286):

x_i[p] <- x_i[p] + strength * s_i[p] * (sum_jq A_ip,jq x_j[q] - x_i[p]),
A_ip = softmax over j != i, q with s_j[q] >= 0.5 of sharpness * cos(f_i[p], f_j[q]).

f are the features x less the mean of the subjects that are looked at, and s in 0..1 is
`cluster_subjects`. The first pictures can be anchors: the others look at them alone, and they at
each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RetrievalError
from ..network.unet import UNet, UNetConfig

STRENGTH = 1.0
START, END = 0.0, 0.4
SHARPNESS = 30.0
# Positions that a picture looks at, of all other pictures together; more are thinned out to a grid.
_MOST_POSITIONS = 2048
_MOST_LOGITS = 1 << 24  # in memory at once
_COPIES = 4  # of the features: in float32, less the mean, their directions, the result
_ITERATIONS = 5
_CONTRAST = 10.0
_LEAST = 1e-6
_HIDDEN = -1e4  # finite: where all positions are hidden, none is


@dataclass(frozen=True)
class ConsistentBatch:
    """How the pictures of a batch share their subject.

    Attributes:
        strength: of the subject's features, how much is the other pictures', 0..1; 0 is the base.
        start, end: the fraction of sampling in which they do, 0 (all noise) to 1.
        anchors: number of first pictures that the others look at; they look at each other. 0 or all
            of them: every picture looks at all others.

    Raises:
        RetrievalError: a strength or schedule outside 0..1, or a negative number of anchors.
    """

    strength: float = STRENGTH
    start: float = START
    end: float = END
    anchors: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise RetrievalError(
                f"The strength of consistent pictures is {self.strength:g}, which must be between "
                "0 (the pictures do not look at each other) and 1."
            )
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise RetrievalError(
                f"Consistent pictures start at {self.start:g} and end at {self.end:g}; both must "
                "lie between 0 and 1, the start not above the end."
            )
        if self.anchors < 0:
            raise RetrievalError(
                f"There are {self.anchors} anchors; give 0 for none, or how many of the first "
                "pictures the others look at."
            )

    def looked_at(self, row: int, rows: int) -> list[int]:
        """The rows of a batch that one of them looks at."""
        seen = range(min(self.anchors, rows) or rows)
        return [other for other in seen if other != row]

    def share(self, x: Tensor) -> Tensor:
        """Features [B, C, H, W] of one prompt's rows, each with the subjects of those it looks at.

        A batch of one is returned as it is.
        """
        if len(x) < 2 or self.strength == 0:
            return x
        size = tuple(x.shape[2:])
        subjects = cluster_subjects(x)
        tokens = x.flatten(2).transpose(1, 2)
        wide = tokens.float()
        shown = subjects[: self.anchors or None]  # anchors depend on nothing but anchors
        mean = (shown[..., None] * wide[: len(shown)]).sum((0, 1)) / shown.sum().clamp_min(_LEAST)
        directions = F.normalize(wide - mean, dim=-1).to(x)
        out = tokens.clone()
        for row in range(len(x)):
            seen = self.looked_at(row, len(x))
            if not seen:  # the only anchor
                continue
            grid = choose_grid(size, len(seen)).to(x.device)
            keys = directions[seen][:, grid].flatten(0, 1)
            hidden = subjects[seen][:, grid].flatten() < 0.5
            values = tokens[seen][:, grid].flatten(0, 1)
            found = []
            for queries in directions[row].split(max(1, _MOST_LOGITS // len(keys))):
                logits = SHARPNESS * (queries @ keys.T).float()
                weights = logits.masked_fill(hidden, _HIDDEN).softmax(-1)
                found.append(weights.to(x) @ values)
            share = self.strength * subjects[row, :, None].to(x)
            out[row] += share * (torch.cat(found) - tokens[row])
        return out.transpose(1, 2).unflatten(2, size)


def choose_grid(size: tuple[int, int], pictures: int) -> Tensor:
    """Indices of a grid of positions of features of `size` (height, width), every n-th along both
    edges, so that those of all pictures together are no more than `_MOST_POSITIONS`."""
    height, width = size
    step = math.ceil(math.sqrt(max(1.0, height * width * pictures / _MOST_POSITIONS)))
    return torch.arange(height * width).view(size)[step // 2 :: step, step // 2 :: step].flatten()


def cluster_subjects(x: Tensor) -> Tensor:
    """How much each position of features [B, C, H, W] shows the subject: [B, H * W] of 0..1.

    Two-means of the features' directions in each picture. One cluster starts as the upper border
    and the sides, where backgrounds usually are, the other as the centre; the lower border is where
    figures are cut off.
    """
    height, width = x.shape[2:]
    tokens = x.flatten(2).transpose(1, 2).float()
    directions = F.normalize(tokens - tokens.mean(1, keepdim=True), dim=-1)
    border = x.new_zeros(height, width, dtype=torch.float32)
    border[0], border[:, 0], border[:, -1] = 1, 1, 1
    down, right = (torch.linspace(-1, 1, n, device=x.device) for n in (height, width))
    centre = torch.exp(-3 * (down[:, None].square() + right.square()))
    outside, subject = border.flatten().expand(len(x), -1), centre.flatten().expand(len(x), -1)
    for _ in range(_ITERATIONS):
        means = [F.normalize(w[:, None] @ directions, dim=-1) for w in (subject, outside)]
        nearer = (directions @ (means[0] - means[1]).transpose(1, 2))[..., 0]
        subject = torch.sigmoid(_CONTRAST * nearer)
        outside = 1 - subject
    return subject


def list_shared_blocks(config: UNetConfig) -> list[int]:
    """Indices of the decoder blocks whose inputs are shared: those above the coarsest resolution.

    Not the first of them: its input has just been upsampled, and does not tell subject and
    background apart yet.
    """
    blocks = sum(config.num_res_blocks) + len(config.num_res_blocks)
    return list(range(config.num_res_blocks[-1] + 2, blocks))


def count_values(config: UNetConfig, shape: Sequence[int]) -> float:
    """Values in memory at once, besides the features, while latents `shape` [B, C, H, W] are drawn:
    logits and weights of some positions, and copies of the largest features."""
    rows, _, height, width = shape
    largest = max(  # the input of a level's first block has the width of the level below
        config.model_channels * mult * height * width / 4**level
        for level, mult in enumerate(config.channel_mult[1:])
    )
    logits = min(_MOST_LOGITS, height * width * _MOST_POSITIONS)
    return 2 * logits + _COPIES * rows * largest


@contextmanager
def share_subjects(
    unet: UNet, batch: ConsistentBatch, groups: int, rows: int, steps: int = 1000
) -> Iterator[None]:
    """Within it, a U-Net of the core shares subjects in its first `groups` runs of `rows` rows.

    Args:
        groups: batches that are drawn at once, each consistent in itself. The rows behind them are
            the negative prompts'.
        steps: of the noise schedule.
    """
    skips = list(unet.config.site_channels().values())[:-1]
    acts = False

    def note_progress(unet: UNet, arguments: tuple) -> None:
        nonlocal acts
        progress = 1 - float(arguments[1][0]) / (steps - 1)
        acts = batch.start <= progress <= batch.end

    def share(block: nn.Module, arguments: tuple, skip: int) -> tuple | None:
        if not acts:
            return None
        joined, *more = arguments  # the stream, and the skip connection behind it
        stream = joined[: groups * rows, :-skip]
        shared = torch.cat([batch.share(group) for group in stream.split(rows)])
        joined = joined.clone()
        joined[: groups * rows, :-skip] = shared
        return (joined, *more)

    handles = [unet.register_forward_pre_hook(note_progress)]
    for index in list_shared_blocks(unet.config):
        hook = partial(share, skip=skips[len(skips) - 1 - index])
        handles.append(unet.output_blocks[index].register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
