"""Encodes references into tokens: one `EncodedReference` per image, or a batch for training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..errors import RetrievalError
from ..network.controlnet import RetrievalControlNet
from .tokens import MATCHED, EncodedReference, SiteTokens, Tokens

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
    """Encodes references in one pass of the encoder and drops the tokens outside their masks.

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
    least: float = 0.0,
) -> list[EncodedReference]:
    """Splits a batch of features into one `EncodedReference` per image, without masked tokens.

    Args:
        latent_size: height and width of the latents.
        masks: one per reference, [H, W] of any size, above 0 inside; None: no mask. Tokens wholly
            outside are dropped; at `MATCHED` their values are set to 0.
        weights: one per reference, 1 by default. concepts: recorded with each reference.
        least: see `select_tokens`.

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
            tokens[site] = batch[i]
            if mask is not None:
                if size not in inside:
                    inside[size] = select_tokens(mask, *size, least).flatten().to(batch.device)
                if site.startswith(MATCHED):
                    tokens[site] = hide_values(batch[i], inside[size])
                else:
                    tokens[site] = batch[i][:, inside[size]]
        weight = 1.0 if weights is None else weights[i]
        concept = "figure" if concepts is None else concepts[i]
        encoded.append(EncodedReference(tokens, weight, concept, (height, width), mask=mask))
    return encoded


def batch_features(
    features: Features,
    latent_size: Sequence[int],
    used: Tensor,
    masks: Tensor | None = None,
    least: float = 0.0,
) -> Tokens:
    """The tokens of G banks of R references each; masked ones have a bias of -inf.

    Args:
        features: of all G * R references. latent_size: height and width of their latents.
        used: bool [G, R], False for dropped references.
        masks: bool [G * R, h, w], None for whole references. least: see `select_tokens`.
    """
    groups, references = used.shape
    sites = {}
    for site, (batch, size) in features.items():
        tokens = rearrange(batch, "(g r) p n d -> g p (r n) d", g=groups)
        count = batch.shape[2]
        inside = used.repeat_interleave(count, 1)
        if masks is not None:
            shown = select_tokens(masks, *size, least).view_as(inside)
            if site.startswith(MATCHED):
                tokens = hide_values(tokens, shown)
            else:
                inside = inside & shown
        bias = None
        if not bool(inside.all()):
            bias = tokens.new_zeros(inside.shape).masked_fill_(~inside, float("-inf"))
        owner = torch.arange(references, device=tokens.device).repeat_interleave(count)
        sites[site] = SiteTokens(tokens, bias, owner)
    height, width = latent_size
    return Tokens(sites, references, (height, width))


def hide_values(tokens: Tensor, inside: Tensor) -> Tensor:
    """Keys and values [..., 2, N, D] with values of 0 outside a mask [..., N]."""
    keys, values = tokens.unbind(-3)
    return torch.stack([keys, values * inside[..., None]], -3)


def select_tokens(mask: np.ndarray | Tensor, height: int, width: int, least: float = 0.0) -> Tensor:
    """Tokens of a height x width grid that a mask [..., H, W] touches: bool [..., height, width].

    The edges need not divide.

    Args:
        least: share of a token that must be more than touched; the fullest tokens always are.
    """
    selected = (torch.as_tensor(mask) > 0).float()
    covered = F.adaptive_avg_pool2d(selected[None], (height, width))[0]
    return (covered > least) | ((covered == covered.amax((-2, -1), keepdim=True)) & (covered > 0))
