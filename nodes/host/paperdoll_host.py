"""The paper-doll base model as the host's own objects, and its reference pictures as tensors.

The host's U-Net, samplers and memory management run the same weights as `retrieval_core`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import numpy as np
import torch
from torch import Tensor, nn

from ...retrieval_core.data import Sample, cut_reference
from ...retrieval_core.data.sample import Concept
from ...retrieval_core.network.unet import UNetConfig
from ...retrieval_core.paperdoll.bundle import BASE_FILE, RETRIEVAL_FILE, find_bundled
from ...retrieval_core.paperdoll.draw import render
from ...retrieval_core.paperdoll.model import PaperdollModel, load_base
from ...retrieval_core.paperdoll.text import TextEncoder, Tokenizer
from ...retrieval_core.paperdoll.vae import PatchVAE
from ...retrieval_core.paperdoll.world import (
    SIZE,
    Figure,
    Identity,
    Outfit,
    random_identity,
    random_outfit,
    random_scene,
)
from .loading import find_patcher_class, load_weights

# In float32 only: at this size half precision saves nothing, and the demo stays exact.
DTYPES = [torch.float32]
TOKENS = "paperdoll"


class PaperdollLatent(comfy.latent_formats.LatentFormat):
    """Unscaled latents of the demo's VAE; previews are the mean colour of each patch."""

    scale_factor = 1.0

    def __init__(self, vae: PatchVAE):
        self.latent_channels = vae.channels
        to_pixels = (vae.basis / vae.scale[:, None]).unflatten(1, (3, -1))
        self.latent_rgb_factors = (2 * to_pixels.mean(-1)).tolist()
        self.latent_rgb_factors_bias = (2 * vae.mean.unflatten(0, (3, -1)).mean(-1) - 1).tolist()


class PaperdollConfig(comfy.supported_models_base.BASE):
    """Settings that the host usually detects from a checkpoint."""

    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012
    memory_usage_factor = 1.0

    def model_type(self, state_dict: Any, prefix: str = "") -> Any:
        return comfy.model_base.ModelType.V_PREDICTION


def convert_config(config: UNetConfig) -> dict[str, Any]:
    """A core U-Net configuration as arguments of the host's `UNetModel`."""
    levels = list(zip(config.num_res_blocks, config.transformer_depth))
    return {
        "image_size": 32,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": config.model_channels,
        "channel_mult": list(config.channel_mult),
        "num_res_blocks": list(config.num_res_blocks),
        "transformer_depth": [d for blocks, d in levels for _ in range(blocks)],
        "transformer_depth_output": [d for blocks, d in levels for _ in range(blocks + 1)],
        "transformer_depth_middle": config.middle_depth,
        "context_dim": config.context_dim,
        "num_heads": -1 if config.num_heads is None else config.num_heads,
        "num_head_channels": -1 if config.num_head_channels is None else config.num_head_channels,
        "use_linear_in_transformer": config.use_linear_in_transformer,
        "adm_in_channels": config.adm_in_channels,
        "use_spatial_transformer": True,
        "use_temporal_attention": False,
        "legacy": False,
    }


def make_model(
    base: PaperdollModel, patcher: type[comfy.model_patcher.ModelPatcher]
) -> comfy.model_patcher.ModelPatcher:
    """The U-Net as the host's MODEL: v-prediction on SD's schedule, weights as in the file."""
    device, offload = management.get_torch_device(), management.unet_offload_device()
    config = PaperdollConfig(convert_config(base.unet.config))
    config.latent_format = PaperdollLatent(base.vae)
    count = sum(parameter.numel() for parameter in base.unet.parameters())
    dtype = management.unet_dtype(device, model_params=count, supported_dtypes=DTYPES)
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, DTYPES))
    model = comfy.model_base.BaseModel(config, config.model_type(None), device=offload)
    load_weights(model.diffusion_model, base.unet.state_dict())
    return patcher(model, load_device=device, offload_device=offload)


def load_model(
    path: str | os.PathLike[str], disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """A base model's file as the host's MODEL, which the host can rebuild from it.

    Args:
        disable_dynamic: without dynamic VRAM, as the host asks for when it compiles or trains.
    """
    plain = comfy.model_patcher.ModelPatcher
    model = make_model(load_base(path), plain if disable_dynamic else find_patcher_class())
    model.cached_patcher_init = (load_model, (path,))
    return model


class HostTokenizer:
    """The demo's tokenizer in the host's form: {name: [[(token, weight), ...]]}."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer()

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> dict:
        """One section of tokens, each of weight 1; RetrievalError for a tag not in the world."""
        tokens = [(token, 1.0) for token in self.tokenizer(text)]
        if return_word_ids:
            tokens = [(token, weight, i) for i, (token, weight) in enumerate(tokens, 1)]
        return {TOKENS: [tokens]}

    def untokenize(self, tokens: list) -> list:
        return [(pair, self.tokenizer.words[pair[0]]) for pair in tokens]

    def state_dict(self) -> dict:
        return {}


class HostText(nn.Module):
    """The demo's text encoder with the methods that the host's CLIP calls."""

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.encoder = encoder
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: dict) -> None:
        """There are no layers to choose from, and no pooled output."""

    def reset_clip_options(self) -> None:
        """See `set_clip_options`."""

    def encode_token_weights(self, tokens: dict) -> tuple[Tensor, None]:
        """Context [1, L, width] of the first section, and no pooled output."""
        ids = [pair[0] for pair in tokens[TOKENS][0]]
        device = self.encoder.embedding.weight.device
        return self.encoder(torch.tensor([ids], device=device)).to(
            management.intermediate_device()
        ), None

    def load_sd(self, weights: dict) -> Any:
        return self.load_state_dict(weights, strict=False)


class HostCLIP(comfy.sd.CLIP):
    """The host's CLIP, always loaded whole: the encoder's attention has no castable layers."""

    def load_model(self, *_: Any, **__: Any) -> comfy.model_patcher.ModelPatcher:
        management.load_models_gpu([self.patcher], force_full_load=True)
        return self.patcher

    def clone(self, *args: Any, **kw: Any) -> HostCLIP:
        copy = super().clone(*args, **kw)
        copy.__class__ = HostCLIP  # the host's clone() names its own class
        return copy


def make_clip(base: PaperdollModel) -> HostCLIP:
    """The text encoder as the host's CLIP."""
    target = comfy.supported_models_base.ClipTarget(
        lambda **_: HostTokenizer(), lambda **_: HostText(base.text)
    )
    options = {"dtype": torch.float32, "initial_device": torch.device("cpu")}
    return HostCLIP(target, model_options=options)


class HostVAE(comfy.sd.VAE):
    """The host's VAE around the demo's patch transform."""

    def __init__(self, vae: PatchVAE):
        log = logging.getLogger()
        log.addFilter(_keep_in_log)
        try:
            super().__init__(sd={})  # every default of this host's version, no network
        finally:
            log.removeFilter(_keep_in_log)
        self.first_stage_model = vae.eval()
        self.latent_channels = vae.channels
        self.downscale_ratio = self.upscale_ratio = vae.patch
        self.process_input = lambda image: image
        self.process_output = lambda image: image.clamp(0.0, 1.0)
        self.working_dtypes = DTYPES
        # Pixels in and out, and the patches between them.
        self.memory_used_encode = lambda shape, dtype: 24 * shape[2] * shape[3] * dtype.itemsize
        self.memory_used_decode = lambda shape, dtype: (
            24 * shape[2] * shape[3] * vae.patch**2 * dtype.itemsize
        )
        # The transform is held in buffers, which a partial load leaves behind.
        self.disable_offload = True
        self.device = management.vae_device()
        self.vae_dtype = torch.float32
        self.output_device = management.intermediate_device()
        self.patcher = find_patcher_class()(
            vae, load_device=self.device, offload_device=management.vae_offload_device()
        )
        self.size = management.module_size(vae)


def _keep_in_log(record: logging.LogRecord) -> bool:
    """Drops one known, harmless message of the host from the user's log."""
    return "No VAE weights detected" not in record.getMessage()


def load_demo(
    batch_size: int, figures: int
) -> tuple[comfy.model_patcher.ModelPatcher, HostCLIP, HostVAE, dict[str, Tensor]]:
    """The bundled base model as MODEL, CLIP and VAE, and a LATENT of zeros, `figures` wide."""
    path = find_bundled(BASE_FILE)
    base = load_base(path)
    shape = (batch_size, base.vae.channels, base.latent_size, base.latent_size * figures)
    latent = {"samples": torch.zeros(shape, device=management.intermediate_device())}
    return load_model(path), make_clip(base), HostVAE(base.vae), latent


def find_demo_network() -> Path:
    """The path of the bundled retrieval network."""
    return find_bundled(RETRIEVAL_FILE)


def draw_character(rng: np.random.Generator) -> tuple[Identity, Outfit]:
    """A character held out of training."""
    return random_identity(rng, True), random_outfit(rng, True)


def draw_references(character: int, concept: Concept, pictures: int) -> tuple[Tensor, Tensor, str]:
    """Draws pictures of a character held out of training, each in another random scene.

    Returns:
        Images [N, 64, 64, 3] in 0..1; masks [N, 64, 64], 1 where the figure is; the character's
        attributes in words.
    """
    rng = np.random.default_rng([character, 30])
    who, clothes = draw_character(rng)
    images, masks = [], []
    for _ in range(pictures):
        drawn = render(Figure(who, clothes, random_scene(rng)))
        sample = Sample(drawn.image, drawn.mask, drawn.head_box)
        images.append(cut_reference(sample, concept, SIZE).image)
        cut = cut_reference(sample, concept, SIZE, remove_background=True).mask
        masks.append(np.ones((SIZE, SIZE), bool) if cut is None else cut)
    words = (
        f"{who.hair_colour} {who.hair_style}, {who.eye_colour} eyes, {who.skin} skin, "
        f"{clothes.upper_pattern} {clothes.upper_colour} {clothes.upper}, "
        f"{clothes.lower_colour} {clothes.lower}"
    )
    stacked = torch.from_numpy(np.stack(images)).float() / 255
    return stacked, torch.from_numpy(np.stack(masks)).float(), words
