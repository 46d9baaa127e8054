"""Generates paper-doll pictures in the core: prompts and references in, pictures out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank.encoding import batch_features, encode_references
from ..bank.site_bank import make_network_bank
from ..bank.token_budget import Budget
from ..bank.tokens import Tokens, join_references
from ..data.prepare import PreparedReference
from ..network.controlnet import Guidance, RetrievalControlNet
from ..sampling.applications import Application
from ..sampling.attention_map import RecordedRetrieval, choose_map_site
from ..sampling.frozen_site import freeze_sites
from ..sampling.sampler import Sampler, make_guided_denoiser, sample
from .bundle import Bundle
from .model import PaperdollModel


@dataclass(frozen=True)
class Sampling:
    """How pictures are made.

    Attributes:
        strength, guidance: None for what the network's file recommends.
        token_budget: see `token_budget.choose_budgets`.
        end: the part of sampling after which references no longer act; below 1, pose follows the
            text a little better for the same attribute match.
    """

    steps: int = 16
    cfg: float = 2.0
    sampler: Sampler = "dpmpp_2m"
    strength: float | None = None
    guidance: Guidance | None = None
    token_budget: Budget = None
    end: float = 0.8


def encode_group(
    base: PaperdollModel, network: RetrievalControlNet, references: Sequence[PreparedReference]
) -> Tokens:
    """Any number of references with their masks and weights, for one bank for a whole batch."""
    if not references:
        return Tokens()
    images = torch.stack([reference.image for reference in references])
    with torch.inference_mode():
        encoded = encode_references(
            network,
            base.vae.encode(images),
            base.text.encode([reference.concept for reference in references]),
            masks=[reference.mask for reference in references],
            weights=[reference.weight for reference in references],
            concepts=[reference.concept for reference in references],
        )
        return join_references(encoded)


def encode_groups(
    base: PaperdollModel,
    network: RetrievalControlNet,
    references: Sequence[Sequence[PreparedReference]],
) -> Tokens:
    """Equally many references for each of a batch of banks (masks count, weights do not)."""
    flat = [reference for group in references for reference in group]
    used = torch.ones(len(references), len(references[0]), dtype=torch.bool)
    images = torch.stack([reference.image for reference in flat])
    with torch.inference_mode():
        latents = base.vae.encode(images)
        context = base.text.encode([reference.concept for reference in flat])
        features = network.encode_features(latents, context)
        return batch_features(features, latents.shape[2:], used, stack_masks(flat))


def stack_masks(references: Sequence[PreparedReference]) -> Tensor:
    """The references' masks, [R, S, S]; of one without, ones."""
    whole = torch.ones(references[0].image.shape[-2:])
    return torch.stack([whole if r.mask is None else r.mask for r in references])


def apply_bank(network: RetrievalControlNet, tokens: Tokens, how: Sampling) -> RecordedRetrieval:
    """The tokens' bank applied, with the recommended settings where `how` gives none.

    It records where the picture looked, at the site `choose_map_site`, for the retrieval map.
    """
    recommended = network.card.recommended
    strength = how.strength if how.strength is not None else float(recommended["strength"])
    guidance = how.guidance or recommended["guidance"]
    site = choose_map_site(network.config)
    with torch.inference_mode():
        bank, seen = make_network_bank(network, tokens, how.token_budget), None
        if how.token_budget is not None and tokens.sites:
            seen = make_network_bank(network, tokens.at(site)).sites[site]
    return RecordedRetrieval(
        bank,
        strength=strength,
        guidance=guidance,
        end=how.end,
        sites=freeze_sites(network),
        recorded=site,
        seen=seen,
    )


def generate(
    bundle: Bundle,
    prompts: Sequence[str],
    noise: Tensor,
    retrieval: Application | None = None,
    how: Sampling | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Pictures [B, 3, 64, 64] in 0..1 for prompts, from unit noise [B, C, 16, 16].

    Args:
        retrieval: of references; None, strength 0 or an empty bank gives the base model's own
            pictures, bit for bit.
        how: see `Sampling`.
        on_step: called with (steps done, steps in all).
    """
    how = how or Sampling()
    base = bundle.base
    if retrieval is not None and (retrieval.strength == 0 or retrieval.bank.empty):
        retrieval = None
    unet = base.unet if retrieval is None else bundle.network.apply_decoder(base.unet)
    with torch.inference_mode():
        cond, uncond = base.text.encode(prompts), base.text.encode([""] * len(prompts))
        applied = [] if retrieval is None else [retrieval]
        denoise = make_guided_denoiser(unet, base.schedule, cond, uncond, how.cfg, applied)
        latents = sample(denoise, noise, base.schedule, how.steps, how.sampler, on_step)
        return base.vae.decode(latents)
