"""The user's MODEL: which base it is, whether a network fits it, and whose weights it has."""

from __future__ import annotations

import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.network.fingerprint import fingerprint_weights
from ...retrieval_core.network.unet import UNetConfig, detect_config

SUPPORTED = "SD 1.5, SD 2.x, SDXL, their inpainting variants and the bundled paper-doll demo"

# (model channels, context width, linear projections, vector conditioning) of each base.
_SIGNATURES = {
    (320, 768, False, None): "sd15",
    (320, 1024, True, None): "sd21",
    (320, 2048, True, 2816): "sdxl",
    (64, 64, False, None): "paperdoll",
}


@dataclass(frozen=True)
class Base:
    """A MODEL's family (one of `controlnet.BASES`), its U-Net's shape, and its latent format."""

    name: str
    config: UNetConfig
    latent_format: Any


def detect_base(model: Any) -> Base:
    """Detects a MODEL's base by the shapes of its weights.

    Raises:
        RetrievalError: a family that retrieval does not support.
    """
    network = model.get_model_object("diffusion_model")
    if isinstance(network, UNetModel):
        with suppress(RetrievalError):
            config = detect_config(dict(network.named_parameters()))
            linear, adm = config.use_linear_in_transformer, config.adm_in_channels
            name = _SIGNATURES.get((config.model_channels, config.context_dim, linear, adm))
            if name is not None:
                return Base(name, config, model.get_model_object("latent_format"))
    given = type(model.model).__name__
    kind = f"{given} model" if given != "BaseModel" else f"'{type(network).__name__}' network"
    raise RetrievalError(
        f"The model given is a {kind}, which retrieval does not support; use a checkpoint of "
        f"{SUPPORTED}."
    )


def check_given(vae: Any, clip: Any) -> None:
    """RetrievalError if a checkpoint's loader gave no VAE or no text encoder."""
    if clip is None:
        raise RetrievalError(
            "The CLIP input is empty, so the checkpoint holds no text encoder; load one with a "
            "CLIP loader."
        )
    if vae is None:
        raise RetrievalError(
            "The VAE input is empty, so the checkpoint holds no VAE; load one with a VAE loader."
        )


def check_fit(base: Base, config: UNetConfig, name: str, file: str) -> None:
    """Refuses, in one sentence, a network made for another U-Net than the model's."""
    if name != base.name:
        raise RetrievalError(
            f"'{file}' is for base '{name}' and the model given is '{base.name}'; choose a file "
            f"for '{base.name}' or load a model of '{name}'."
        )
    ours, theirs = config.site_channels(), base.config.site_channels()
    if ours != theirs:
        widths, found = ("/".join(map(str, sites.values())) for sites in (ours, theirs))
        raise RetrievalError(
            f"'{file}' has {len(ours)} sites of widths {widths} and this '{name}' model has "
            f"{len(theirs)} of {found}; use the file made for this variant."
        )


# By `model.model`, for as long as it lives.
_fingerprints: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def fingerprint_base(model: Any) -> str:
    """Fingerprint of a MODEL's own weights, without what was patched onto them.

    The host stores weights in the file's type or in the type that it computes in, and patches them
    in place, with the originals in `backup`. The fingerprint is of the originals, in the type that
    the model computes in.
    """
    if model.model not in _fingerprints:
        _fingerprints[model.model] = fingerprint_weights(*list_own_weights(model))
    return _fingerprints[model.model]


def list_own_weights(model: Any) -> tuple[dict[str, Tensor], dict[str, torch.dtype | None]]:
    """The weights of a MODEL's U-Net by name, without what was patched onto them, and the types
    that they are computed in where those differ from the stored ones."""
    network = model.get_model_object("diffusion_model")
    weights: dict[str, Tensor] = {}
    types: dict[str, torch.dtype | None] = {}
    for prefix, module in network.named_modules():
        for name, value in module.named_parameters(prefix, recurse=False):
            original = model.backup.get(f"diffusion_model.{name}")
            weights[name] = value if original is None else original.weight
            types[name] = getattr(module, f"{name.rpartition('.')[2]}_comfy_model_dtype", None)
    return weights, types


def identify_model(patched: Any) -> tuple[Any, Any]:
    """A hashable key, equal for ModelPatchers of one model with the same weight patches.

    A weak reference, not an id: another model may later have the same address.
    """
    return weakref.ref(patched.model), patched.patches_uuid
