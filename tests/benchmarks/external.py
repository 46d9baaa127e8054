"""Other packs, imported from checkouts that environment variables name."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

IP_ADAPTER, ADVANCED_CONTROLNET = "IPADAPTER_PLUS_PATH", "ADVANCED_CONTROLNET_PATH"
# Widths of SD 1.5's cross-attention layers in IP-Adapter's order: input, output, middle.
_WIDTHS = (320, 320, 640, 640, 1280, 1280, *(1280,) * 3, *(640,) * 3, *(320,) * 3, 1280)
_CLIP_TOKENS, _CLIP_WIDTH, _TOKENS = 257, 1280, 16
_BLOCKS = 12  # in each half of SD 1.5's U-Net


def checkout(variable: str) -> Path | None:
    """The folder that an environment variable names; ValueError if there is no pack in it."""
    named = os.environ.get(variable)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not (folder / "__init__.py").is_file():
        raise ValueError(
            f"{variable}={named} has no __init__.py; set it to the folder of the checkout, or "
            "unset it."
        )
    return folder


def _package(variable: str) -> ModuleType:
    """The pack, imported as the host would."""
    folder = checkout(variable)
    assert folder is not None
    name = f"benchmark_{variable.lower()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def ip_adapter_plus(model: Any, count: int) -> Any:
    """The MODEL with IP-Adapter Plus for SD 1.5 on `count` pictures; random weights."""
    name = _package(IP_ADAPTER).__name__
    pack, parts = sys.modules[f"{name}.IPAdapterPlus"], sys.modules[f"{name}.image_proj_models"]
    generator = torch.Generator().manual_seed(6)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    resampler = parts.Resampler(
        dim=768, depth=4, dim_head=64, heads=12, num_queries=_TOKENS,
        embedding_dim=_CLIP_WIDTH, output_dim=768, ff_mult=4,
    )  # fmt: skip
    layers = {
        f"{2 * i + 1}.to_{kind}_ip.weight": noise(width, 768)
        for i, width in enumerate(_WIDTHS)
        for kind in "kv"
    }
    weights = {"image_proj": resampler.state_dict(), "ip_adapter": layers}
    embeds = [noise(count, _CLIP_TOKENS, _CLIP_WIDTH) for _ in range(2)]
    with torch.inference_mode(False), torch.no_grad():
        patched, _ = pack.ipadapter_execute(
            model.clone(), weights, None, pos_embed=embeds[0], neg_embed=embeds[1]
        )
    return patched


def reference_only(
    positive: list,
    negative: list,
    latents: Sequence[torch.Tensor],
    kind: str = "reference_attn",
    fidelity: float = 0.5,
) -> tuple[list, list]:
    """The conditionings with Advanced-ControlNet's reference mode, one ControlNet for each latent.

    Args:
        latents: [B, C, H, W] each; with several rows, each is the reference of a picture.
        kind: as its node offers it. fidelity: its style fidelity.
    """
    name = _package(ADVANCED_CONTROLNET).__name__
    from nodes import ControlNetApplyAdvanced

    module = sys.modules[f"{name}.adv_control.control_reference"]
    options = module.ReferenceOptions.create_combo(kind, fidelity, 1.0)
    for latent in latents:
        control = module.ReferenceAdvanced(ref_opts=options, timestep_keyframes=None)
        wrapped = module.ReferencePreprocWrapper(condhint=latent)
        positive, negative = ControlNetApplyAdvanced().apply_controlnet(
            positive, negative, control, wrapped, 1.0, 0.0, 1.0
        )[:2]
    return positive, negative


class _SpreadBlocks(torch.nn.ModuleList):
    """A U-Net's blocks under the numbers of SD 1.5's twelve, each at the same part of the depth.

    A number that has no block of its own gives a module that never runs.
    """

    def __getitem__(self, number: int) -> torch.nn.Module:
        here, following = (i * len(self) // _BLOCKS for i in (number, number + 1))
        return super().__getitem__(here) if following > here else torch.nn.Identity()


@contextmanager
def number_blocks_as_sd15(unet: Any) -> Iterator[None]:
    """Lets Advanced-ControlNet, which names SD 1.5's blocks by number, run a smaller U-Net."""
    halves = unet.input_blocks, unet.output_blocks
    unet.input_blocks, unet.output_blocks = (_SpreadBlocks(half) for half in halves)
    try:
        yield
    finally:
        unet.input_blocks, unet.output_blocks = halves
