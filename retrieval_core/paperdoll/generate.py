"""Generates paper-doll pictures in the core, from prompts and references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from ..bank.encoding import Features, batch_features, encode_references
from ..bank.site_bank import make_bank, make_network_bank
from ..bank.token_budget import Budget
from ..bank.tokens import Tokens, join_references
from ..data.prepare import PreparedReference
from ..network.controlnet import Guidance, RetrievalControlNet
from ..network.unet import UNet
from ..sampling.applications import Application
from ..sampling.attention_map import RecordedRetrieval, choose_map_site
from ..sampling.frozen_site import freeze_sites
from ..sampling.presets import BALANCED, PRESETS, Preset
from ..sampling.sampler import Sampler, make_guided_denoiser, sample
from ..training_free import JointRetrieval, TrainingFree, name_layers, record
from .bundle import Bundle
from .model import PaperdollModel


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling and retrieval.

    Attributes:
        strength, guidance: None for what the network's file recommends.
        token_budget: see `token_budget.choose_budgets`.
        end: fraction of sampling after which retrieval stops; below 1, pose follows the text a
            little better for the same attribute match.
        preset: one of `PRESETS`.
    """

    steps: int = 16
    cfg: float = 2.0
    sampler: Sampler = "dpmpp_2m"
    strength: float | None = None
    guidance: Guidance | None = None
    token_budget: Budget = None
    end: float = 0.8
    preset: str = BALANCED


def encode_group(
    base: PaperdollModel, network: RetrievalControlNet, references: Sequence[PreparedReference]
) -> Tokens:
    """Tokens of any number of references with masks and weights, for one bank per batch."""
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
    groups: Sequence[Sequence[PreparedReference]],
) -> Tokens:
    """One group of references per row of a batch, equally many each; weights are ignored."""
    return _batch_groups(base, groups, network.encode_features)


def apply_training_free(
    base: PaperdollModel,
    network: TrainingFree,
    groups: Sequence[Sequence[PreparedReference]],
    strength: float,
    guidance: Guidance = "cond",
    end: float = 1.0,
    preset: Preset = PRESETS[BALANCED],
    least: float = 0.0,
) -> JointRetrieval:
    """Joint retrieval from one group of references per row, as in `encode_groups`.

    least: see `select_tokens`.
    """
    tokens = _batch_groups(base, groups, partial(_record, base, network), least)
    with torch.inference_mode():
        bank = make_bank(tokens, None, network.site_downsampling())
    return JointRetrieval(
        bank,
        strength,
        end=end,
        guidance=guidance,
        names=name_layers(base.unet),
        match_layer=network.match_layer,
        preset=preset,
        timesteps=network.timesteps(),
        adain=network.adain,
    )


def _record(
    base: PaperdollModel, network: TrainingFree, latents: Tensor, context: Tensor
) -> Features:
    """The sites of a bank."""
    features = record(base.unet, base.schedule, network, latents, context)
    return {site: features[site] for site in network.site_channels()}


def _batch_groups(
    base: PaperdollModel,
    groups: Sequence[Sequence[PreparedReference]],
    encode: Callable[[Tensor, Tensor], Features],
    least: float = 0.0,
) -> Tokens:
    flat = [reference for group in groups for reference in group]
    used = torch.ones(len(groups), len(groups[0]), dtype=torch.bool, device=base.device)
    unmasked = torch.ones(flat[0].image.shape[-2:])
    masks = torch.stack([unmasked if r.mask is None else r.mask for r in flat]).to(base.device)
    with torch.inference_mode():
        images = torch.stack([reference.image for reference in flat]).to(base.device)
        latents = base.vae.encode(images)
        context = base.text.encode([reference.concept for reference in flat])
        return batch_features(encode(latents, context), latents.shape[2:], used, masks, least)


def apply_bank(network: RetrievalControlNet, tokens: Tokens, how: Sampling) -> RecordedRetrieval:
    """Retrieval from the tokens' bank, with the recommended settings where `how` gives none.

    It records attention at the site `choose_map_site`, for the retrieval map.
    """
    recommended = network.card.recommended
    strength = how.strength if how.strength is not None else float(recommended["strength"])
    strength, end = PRESETS[how.preset].limit(strength, 0.0, how.end)
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
        end=end,
        sites=freeze_sites(network),
        recorded=site,
        seen=seen,
    )


def generate(
    bundle: Bundle,
    prompts: Sequence[str],
    noise: Tensor,
    retrieval: Application | None,
    how: Sampling,
) -> Tensor:
    """Pictures [B, 3, 64, 64] in 0..1 for prompts, from unit noise [B, C, 16, 16].

    Args:
        retrieval: of references; None, strength 0 or an empty bank gives the base model's
            pictures, bit for bit.
    """
    base = bundle.base
    if retrieval is None or retrieval.strength == 0 or retrieval.bank.empty:
        return sample_pictures(base, base.unet, prompts, noise, [], how)
    unet = bundle.network.apply_decoder(base.unet)
    return sample_pictures(base, unet, prompts, noise, [retrieval], how)


def sample_pictures(
    base: PaperdollModel,
    unet: UNet,
    prompts: Sequence[str],
    noise: Tensor,
    applied: Sequence[Application],
    how: Sampling,
) -> Tensor:
    """Pictures as `generate`'s, from the base model with `unet` in place of its U-Net.

    noise and pictures are on the CPU, wherever the base is.
    """
    with torch.inference_mode():
        noise = noise.to(base.device)
        cond, uncond = base.text.encode(prompts), base.text.encode([""] * len(prompts))
        denoise = make_guided_denoiser(unet, base.schedule, cond, uncond, how.cfg, applied)
        latents = sample(denoise, noise, base.schedule, how.steps, how.sampler)
        return base.vae.decode(latents).cpu()


def draw_noise(base: PaperdollModel, seed: int, index: int, width: int = 1) -> Tensor:
    """Unit noise [1, C, 16, 16 * width] of picture `index`; it depends on nothing else."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return rearrange(base.noise(width, generator), "n c h w -> 1 c h (n w)")
