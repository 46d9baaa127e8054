"""References as tokens: encoded by a trained network, and split or batched for banks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RetrievalError
from ..network.controlnet import RetrievalControlNet
from .tokens import EncodedReference, Tokens, batch_references

# site -> (tokens [R, P, H * W, D] as in `EncodedReference`, (H, W)).
Features = Mapping[str, tuple[Tensor, tuple[int, int]]]


def encode_references(
    network: RetrievalControlNet,
    latents: Tensor,
    context: Tensor,
    y: Tensor | None = None,
    masks: Sequence[Tensor | None] | None = None,
    weights: Sequence[float] | None = None,
    concepts: Sequence[str] | None = None,
) -> list[EncodedReference]:
    """Encodes references once, in one pass of the encoder, without the tokens outside their masks.

    Args:
        latents, context, y: see `RetrievalControlNet.encode_features`.
        masks, weights, concepts: see `split_features`.

    Raises:
        RetrievalError: a mask selects nothing.
    """
    features = network.encode_features(latents, context, y)
    masks = masks or [None] * len(latents)
    return split_features(features, latents.shape[2:], masks, weights, concepts)


def split_features(
    features: Features,
    latent_size: Sequence[int],
    masks: Iterable[Tensor | None],
    weights: Sequence[float] | None = None,
    concepts: Sequence[str] | None = None,
) -> list[EncodedReference]:
    """The features of a batch as one `EncodedReference` each.

    Args:
        latent_size: height and width of the latents.
        masks: one [H, W] mask a reference, of any size, above 0 where it counts; None: all. Tokens
            wholly outside are left out.
        weights: one a reference, 1 by default. concepts: recorded with each reference.

    Raises:
        RetrievalError: a mask selects nothing.
    """
    encoded, masks = [], list(masks)
    height, width = latent_size
    for i, mask in enumerate(masks):
        if mask is not None and not bool((mask > 0).any()):
            raise RetrievalError(
                f"The mask of reference {i + 1} of {len(masks)} selects nothing; select what is to "
                "be taken, or leave the mask out."
            )
        inside: dict[tuple[int, int], Tensor] = {}
        tokens = {}
        for site, (batch, size) in features.items():
            own = batch[i]
            if mask is not None:
                if size not in inside:
                    inside[size] = select_tokens(mask, *size).flatten().to(own.device)
                own = own[:, inside[size]]
            tokens[site] = own
        weight = 1.0 if weights is None else weights[i]
        concept = "figure" if concepts is None else concepts[i]
        encoded.append(EncodedReference(tokens, weight, concept, (height, width)))
    return encoded


def batch_features(
    features: Features,
    latent_size: Sequence[int],
    used: Tensor,
    masks: Tensor | None = None,
) -> Tokens:
    """The features of G x R references as the tokens of G banks, as training uses them.

    Args:
        features: of all G * R references. latent_size: height and width of their latents.
        used: bool [G, R], False for dropped references.
        masks: bool [G * R, h, w], None for whole references.
    """
    keep = {}
    for site, (batch, size) in features.items():
        kept = used[:, :, None].expand(*used.shape, batch.shape[2])
        if masks is not None:
            shown = F.adaptive_max_pool2d(masks[:, None].float(), size) > 0
            kept = kept & shown.view(*used.shape, -1)
        keep[site] = kept
    tokens = {site: batch.unflatten(0, used.shape) for site, (batch, _) in features.items()}
    height, width = latent_size
    return batch_references(tokens, keep, (height, width))


def select_tokens(mask: np.ndarray | Tensor, height: int, width: int) -> Tensor:
    """Which tokens of a height x width grid over a mask [H, W] are kept: bool [height, width].

    A token is left out only if it falls wholly outside the mask; the edges need not divide.
    """
    selected = (torch.as_tensor(mask) > 0).float()
    return F.adaptive_max_pool2d(selected[None, None], (height, width))[0, 0] > 0
