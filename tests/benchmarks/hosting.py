"""The real ComfyUI, the pack inside it, and a base model of random weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from retrieval_core.network.unet import SD15, SDXL
from tests.conftest import find_comfyui
from tests.helpers.dynamic_vram import enable_dynamic_vram
from tests.helpers.lazy_layers import give_weights

PACK = Path(__file__).resolve().parents[2]
NAME = "retrieval_pack"
# Base -> what it is called, its U-Net's shape, and the edge of its pictures in pixels.
BASES = {"sd15": ("SD 1.5", SD15, 512), "sdxl": ("SDXL", SDXL, 1024)}


def start(cpu: bool = False) -> ModuleType:
    """Imports ComfyUI, which must be there, and the pack into it; dynamic VRAM on NVIDIA cards.

    The host's attention is torch's on every device: it is the host's choice on GPUs, where the
    ratio matters to most users, and on CPUs the fastest.
    """
    folder = find_comfyui()
    assert folder is not None
    sys.path.insert(0, str(folder))
    from comfy.cli_args import args

    args.cpu = cpu or not _accelerated()
    args.use_pytorch_cross_attention = True
    if not args.cpu and torch.cuda.is_available():
        enable_dynamic_vram()
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return sys.modules[NAME]


def _accelerated() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def host_version() -> str:
    from comfyui_version import __version__

    return __version__


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Gives a module's layers weights of `draw_weight`."""
    generator = torch.Generator().manual_seed(seed)
    give_weights(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(draw_weight(name, parameter.shape, generator))
    module.eval().requires_grad_(False)


def draw_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A random weight that keeps activations finite, so that values do not slow down arithmetic."""
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    reach = shape[1:].numel() ** -0.5
    empty = torch.empty(shape, device=generator.device)
    return empty.uniform_(-reach, reach, generator=generator)


def base_model(config: Any) -> Any:
    """A MODEL as the host loads it from a checkpoint: float16, or float32 on a CPU."""
    import comfy.model_management as management
    import comfy.sd
    from retrieval_pack.retrieval_core.network.unet import UNet

    device = management.get_torch_device()
    dtype = torch.float32 if management.is_device_cpu(device) else torch.float16
    generator = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(0)
    return comfy.sd.load_diffusion_model_state_dict(
        {
            name: draw_weight(name, tensor.shape, generator).to("cpu", dtype)
            for name, tensor in UNet(config, device="meta").state_dict().items()
        }
    )
