"""What the pack knows of ComfyUI: its models, memory, numeric types, attention and folders.

The networks come from `retrieval_core`; here they get the host's layers and memory management.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn

from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.network.unet import UNetConfig, config_from_state_dict, timestep_embedding

FOLDER = "retrieval_controlnet"
REFERENCES_FOLDER = "retrieval_references"
EXTENSIONS = {".safetensors", ".sft"}
SUPPORTED = "SD 1.5, SD 2.x, SDXL, their inpainting variants and the bundled paper-doll demo"

# Layers that cast their weights to the input, so that any weight type meets any base model's.
OPERATIONS = comfy.ops.manual_cast

# (model channels, context width, linear projections, vector conditioning) of each base.
_SIGNATURES = {
    (320, 768, False, None): "sd15",
    (320, 1024, True, None): "sd21",
    (320, 2048, True, 2816): "sdxl",
    (64, 64, False, None): "paperdoll",
}
# Edge in pixels that each base was trained at, the default size of its references.
NATIVE_SIZE = {"sd15": 512, "sd21": 768, "sdxl": 1024, "paperdoll": 64}


@dataclass(frozen=True)
class Base:
    """What a MODEL is: its family (one of `controlnet.BASES`), its U-Net's shape, its latents."""

    name: str
    config: UNetConfig
    latent_format: Any


def register_folder(name: str = FOLDER) -> None:
    """Makes models/<name> known, with the paths extra_model_paths.yaml added."""
    paths, _ = folder_paths.folder_names_and_paths.get(name, ([], set()))
    default = os.path.join(folder_paths.models_dir, name)
    kept = list(dict.fromkeys([*paths, default]))
    folder_paths.folder_names_and_paths[name] = (kept, set(EXTENSIONS))


def network_files() -> list[str]:
    """Names of the files in models/retrieval_controlnet."""
    return folder_paths.get_filename_list(FOLDER)


def network_path(name: str) -> str:
    """The path of a file of `network_files`; RetrievalError if it has gone."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise RetrievalError(
            f"There is no file '{name}' in models/{FOLDER}; choose another, or press R to reload "
            "the list."
        )
    return path


def download_folder() -> str:
    """Where files from the hub go: the first of the folder's paths."""
    return folder_paths.get_folder_paths(FOLDER)[0]


def transfer_progress() -> Callable[[int, int], None]:
    """A callback (bytes done, bytes in all) that moves the node's bar and heeds interruptions."""
    bar = comfy.utils.ProgressBar(1)

    def progress(done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return progress


def detect_base(model: Any) -> Base:
    """What a MODEL is, by its network's own shape, never by a file's name.

    Raises:
        RetrievalError: it is of a family that retrieval does not support.
    """
    network = model.get_model_object("diffusion_model")
    config, name = None, None
    if isinstance(network, UNetModel):
        try:
            config = config_from_state_dict(network.state_dict())
        except RetrievalError:
            config = None
    if config is not None:
        linear, adm = config.use_linear_in_transformer, config.adm_in_channels
        name = _SIGNATURES.get((config.model_channels, config.context_dim, linear, adm))
    if config is None or name is None:
        given = type(model.model).__name__
        kind = f"{given} model" if given != "BaseModel" else f"'{type(network).__name__}' network"
        raise RetrievalError(
            f"The model given is a {kind}, which retrieval does not support; use a checkpoint of "
            f"{SUPPORTED}."
        )
    return Base(name, config, model.get_model_object("latent_format"))


def check_fit(base: Base, config: UNetConfig, name: str, file: str) -> None:
    """Refuses, in one sentence, a network made for another U-Net than the model's."""
    ours, theirs = config.site_channels(), base.config.site_channels()
    if name != base.name:
        raise RetrievalError(
            f"'{file}' is for base '{name}' and the model given is '{base.name}'; choose a file "
            f"for '{base.name}' or load a model of '{name}'."
        )
    if ours != theirs:
        raise RetrievalError(
            f"'{file}' has {len(ours)} sites of widths {_widths(ours)} and this '{name}' model "
            f"has {len(theirs)} of {_widths(theirs)}; use the file made for this variant."
        )


def _widths(sites: dict[str, int]) -> str:
    return "/".join(str(width) for width in sites.values())


def choose_types(
    base: str, stored: torch.dtype | None, parameters: int
) -> tuple[torch.dtype, torch.dtype]:
    """The types of a network's weights and of its computation, as the host would choose them."""
    device = management.get_torch_device()
    types = [torch.float16, torch.bfloat16, torch.float32]
    if base == "paperdoll":  # as its base model: too small to gain by half precision
        types = [torch.float32]
    weights = management.unet_dtype(
        device, model_params=parameters, supported_dtypes=types, weight_dtype=stored
    )
    return weights, management.unet_manual_cast(weights, device, types) or weights


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """The host's attention in the core's signature."""
    if mask is not None:
        return host_attention.optimized_attention_masked(q, k, v, heads, mask=mask.to(q))
    return host_attention.optimized_attention(q, k, v, heads)


def attend_upcast(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
) -> Tensor:
    """`attend` with logits in float32, without which SD 2.x overflows in half precision."""
    return host_attention.optimized_attention_masked(
        q, k, v, heads, mask=None if mask is None else mask.to(q), attn_precision=torch.float32
    )


def attention_for(base: str) -> Any:
    return attend_upcast if base == "sd21" else attend


def offload_device() -> torch.device:
    return management.unet_offload_device()


def patcher(module: nn.Module) -> comfy.model_patcher.ModelPatcher:
    """A module in the host's care: it loads, partly loads and unloads it."""
    return comfy.model_patcher.ModelPatcher(
        module, load_device=management.get_torch_device(), offload_device=offload_device()
    )


def encode_text(clip: Any, text: str) -> tuple[Tensor, Tensor | None]:
    """Context [1, L, D] and pooled output [1, P] (or None) of a text by a CLIP."""
    if clip is None:
        raise RetrievalError(
            "The CLIP input is empty, so the checkpoint holds no text encoder; load one with a "
            "CLIP loader."
        )
    return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


def encode_pixels(vae: Any, images: Tensor, latent_format: Any) -> Tensor:
    """Latents [R, C, h, w] of images [R, S, S, 3] in 0..1, scaled as the base model's are."""
    if vae is None:
        raise RetrievalError(
            "The VAE input is empty, so the checkpoint holds no VAE; load one with a VAE loader."
        )
    return latent_format.process_in(vae.encode(images))


def vector_conditioning(pooled: Tensor | None, size: int, width: int) -> Tensor:
    """SDXL's vector [1, width] for a square of `size` pixels, neither scaled nor cropped."""
    sizes = timestep_embedding(torch.tensor([size, size, 0, 0, size, size]), 256).flatten()[None]
    found = None if pooled is None else pooled.shape[-1]
    if found != width - sizes.shape[1]:
        raise RetrievalError(
            f"The CLIP given has a pooled output of {found or 'no'} values and the network needs "
            f"{width - sizes.shape[1]}; connect the CLIP of an SDXL checkpoint."
        )
    return torch.cat([pooled.to(sizes), sizes], 1)


def identity(patched: Any) -> tuple[Any, Any]:
    """Equal for ModelPatchers of one model with the same weight patches, and hashable.

    A weak reference, not an id: another model may later lie at the same address.
    """
    return weakref.ref(patched.model), patched.patches_uuid
