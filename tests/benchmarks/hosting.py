"""The real ComfyUI, the pack inside it, and a base model of random weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.conftest import find_comfyui
from tests.helpers.lazy_layers import give_weights

PACK = Path(__file__).resolve().parents[2]
NAME = "retrieval_pack"


def start(cpu: bool = False) -> ModuleType:
    """Imports ComfyUI, which must be there, and the pack into it.

    The host's attention is torch's on every device: it is the host's choice on GPUs, where the
    ratio matters to most users, and on CPUs the fastest.
    """
    folder = find_comfyui()
    assert folder is not None
    sys.path.insert(0, str(folder))
    from comfy.cli_args import args

    args.cpu = cpu or not _accelerated()
    args.use_pytorch_cross_attention = True
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
    """Random weights that keep activations finite, so that values do not slow down arithmetic."""
    generator = torch.Generator().manual_seed(seed)
    give_weights(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                reach = parameter[0].numel() ** -0.5
                drawn = torch.empty(parameter.shape).uniform_(-reach, reach, generator=generator)
                parameter.copy_(drawn)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    module.eval().requires_grad_(False)


def base_model(config: Any) -> Any:
    """A MODEL as the host loads it from a checkpoint: float16, or float32 on a CPU."""
    import comfy.model_management as management
    import comfy.sd
    from retrieval_pack.retrieval_core.network.unet import UNet

    shapes = UNet(config, device="meta").state_dict()
    on_cpu = management.is_device_cpu(management.get_torch_device())
    dtype = torch.float32 if on_cpu else torch.float16
    zero = torch.zeros(1, dtype=dtype)  # expanded views take no memory
    model = comfy.sd.load_diffusion_model_state_dict(
        {name: zero.expand(tensor.shape) for name, tensor in shapes.items()}
    )
    randomise(model.model.diffusion_model)
    return model
