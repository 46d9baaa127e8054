"""The paper-doll base models: U-Net, text encoder, VAE and noise schedule, in one file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import torch
from torch import Tensor, nn

from ..errors import RetrievalError
from ..files import check_format, parse_json, read_safetensors, save_safetensors
from ..network.unet import UNet, UNetConfig, load_strictly
from ..sampling.noise_schedule import NoiseSchedule
from .text import TextEncoder
from .vae import PATCH, PatchVAE
from .world import SIZE

FORMAT = "paperdoll_base"
CHANNELS = 24
WIDTH = 64
CONFIG = UNetConfig(
    model_channels=64,
    channel_mult=(1, 2, 2),
    num_res_blocks=(1, 1, 1),
    transformer_depth=(0, 1, 0),
    middle_depth=1,
    context_dim=WIDTH,
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    num_head_channels=32,
)
# A second base for the same pictures, with latents of 32x32. It is not bundled.
SECOND_PATCH = 2
PATCHES = (PATCH, SECOND_PATCH)
SECOND_CONFIG = UNetConfig(
    model_channels=32,
    channel_mult=(2, 3, 4, 5),
    num_res_blocks=(1, 1, 2, 1),
    transformer_depth=(0, 1, 2, 0),
    middle_depth=1,
    context_dim=96,
    in_channels=8,
    out_channels=8,
    num_head_channels=16,
)
SCHEDULE = NoiseSchedule(prediction="v")
UNET_PREFIX = "model.diffusion_model."


class PaperdollModel(nn.Module):
    """U-Net (SD's family and layout), text encoder and VAE of the paper-doll world."""

    def __init__(self, config: UNetConfig = CONFIG, patch: int = PATCH) -> None:
        super().__init__()
        self.schedule = SCHEDULE
        self.unet = UNet(config)
        self.text = TextEncoder(config.context_dim)
        self.vae = PatchVAE(config.in_channels, patch)

    @property
    def latent_size(self) -> int:
        """Edge of a picture's latent."""
        return SIZE // self.vae.patch

    @property
    def device(self) -> torch.device:
        return self.vae.mean.device

    def initialise(self) -> None:
        """Zero-starts the layers that SD starts at zero: block outputs and the last convolution."""
        zeroed = (".out_layers.3.", ".proj_out.", ".out.2.")
        with torch.no_grad():
            for name, parameter in self.unet.named_parameters():
                if any(layer in f".{name}" for layer in zeroed):
                    parameter.zero_()

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Unit noise [count, C, S, S] on the CPU, from a CPU generator; S: `latent_size`."""
        shape = (count, self.unet.config.in_channels, self.latent_size, self.latent_size)
        return torch.randn(shape, generator=generator)

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Writes `model.diffusion_model.*`, `text.*` and `vae.*` atomically; the VAE in float32."""
        tensors = {UNET_PREFIX + k: v.to(dtype) for k, v in self.unet.state_dict().items()}
        tensors |= {f"text.{k}": v.to(dtype) for k, v in self.text.state_dict().items()}
        tensors |= {f"vae.{k}": v for k, v in self.vae.state_dict().items()}
        metadata = {"format": FORMAT, "config": json.dumps(asdict(self.unet.config))}
        if self.vae.patch != PATCH:
            metadata["patch"] = str(self.vae.patch)
        save_safetensors(path, tensors, metadata)


def load_base(path: str | os.PathLike[str]) -> PaperdollModel:
    """Reads a base model's file in float32.

    Raises:
        RetrievalError: no such file, a damaged one, another format, an unknown patch size, or keys
            that do not fit.
    """
    tensors, metadata = read_safetensors(path)
    remedy = "use the base model bundled with the pack or one of retrieval_core.paperdoll.train"
    check_format(path, metadata, FORMAT, remedy)
    config = UNetConfig.from_dict(parse_json(metadata.get("config"), "config", path))
    patch = metadata.get("patch", str(PATCH))
    if patch not in map(str, PATCHES):
        raise RetrievalError(
            f"'{path}' has a VAE of {patch!r} pixels a patch, where one of {PATCHES} belongs; "
            f"{remedy}."
        )
    model = PaperdollModel(config, int(patch))
    weights = {
        "unet." + k.removeprefix(UNET_PREFIX) if k.startswith(UNET_PREFIX) else k: v.float()
        for k, v in tensors.items()
    }
    load_strictly(model, weights, f"base model '{path}'")
    return model.eval().requires_grad_(False)
