"""The pack's networks in the host's model management: layers, types, loading and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from PIL import Image
from torch import Tensor, nn

from ...retrieval_core.bank.site_bank import Bank

# Layers that cast their weights to the input, so that any weight type meets any base model's.
OPERATIONS = comfy.ops.manual_cast


def choose_types(
    base: str, stored: torch.dtype | None, parameters: int
) -> tuple[torch.dtype, torch.dtype]:
    """The types of a network's weights and of its computation, by the host's own rules."""
    device = management.get_torch_device()
    types = [torch.float16, torch.bfloat16, torch.float32]
    if base == "paperdoll":  # as its base model: too small to gain by half precision
        types = [torch.float32]
    weights = management.unet_dtype(
        device, model_params=parameters, supported_dtypes=types, weight_dtype=stored
    )
    return weights, management.unet_manual_cast(weights, device, types) or weights


def find_patcher_class() -> type[comfy.model_patcher.ModelPatcher]:
    """The host's patcher class for models; looked up at each call, because it is set at start."""
    # 0.8.0 has only one.
    return getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


def wrap_module(module: nn.Module) -> comfy.model_patcher.ModelPatcher:
    """Wraps a module in a patcher, by which the host loads, partly loads and unloads it."""
    return find_patcher_class()(
        module,
        load_device=management.get_torch_device(),
        offload_device=management.unet_offload_device(),
    )


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads weights into a module of the host's layers, as the host loads its own models."""
    if hasattr(management, "archive_model_dtypes"):  # the types that dynamic VRAM casts to
        management.archive_model_dtypes(module)
    # With dynamic VRAM, layers hold the file's own tensors.
    plain = find_patcher_class() is comfy.model_patcher.ModelPatcher
    on_cpu = management.is_device_cpu(management.get_torch_device())
    module.load_state_dict(dict(weights), assign=not plain and not on_cpu)


def read_weights(layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Reads a layer's weight and bias to the CPU, whichever device holds them."""
    return comfy.ops.cast_bias_weight(
        layer, dtype=dtype, device=torch.device("cpu"), bias_dtype=dtype
    )


def reserve_memory(nbytes: Callable[[Any, torch.dtype], int]) -> Callable[..., Any]:
    """A PREPARE_SAMPLING wrapper that adds to the host's estimate of sampling memory.

    The host's estimate is proportional to the latent's area and reads nothing else of the shape:
    the wrapper widens the shape in proportion to the additional bytes.

    Args:
        nbytes: additional bytes by the noise's shape [B, C, H, W] and the model's type.
    """

    def prepare_sampling(
        executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kw: Any
    ) -> Any:
        if len(noise_shape) == 4:
            kind = getattr(model.model, "manual_cast_dtype", None) or model.model_dtype()
            estimate = max(1.0, float(model.memory_required(list(noise_shape))))
            wider = 1 + nbytes(noise_shape, kind) / estimate
            noise_shape = [*noise_shape[:3], noise_shape[3] * wider]
        return executor(model, noise_shape, conds, *args, **kw)

    return prepare_sampling


def make_bank_on_device(make: Callable[..., Bank]) -> Bank:
    """Makes a bank under a progress bar; on the CPU if the device is out of memory.

    Args:
        make: `make_bank` or `make_network_bank`, but for `device` and `on_site`.
    """
    progress = make_progress()
    try:
        return make(device=management.get_torch_device(), on_site=progress)
    except management.OOM_EXCEPTION:
        return make(device="cpu", on_site=progress)


def make_progress() -> Callable[..., None]:
    """A callback (done, in all) that moves the node's bar and heeds interruptions.

    A third argument, uint8 [h, w, 3], is shown on the node.
    """
    bar = comfy.utils.ProgressBar(1)

    def progress(done: int, total: int, picture: Tensor | None = None) -> None:
        management.throw_exception_if_processing_interrupted()
        shown = None
        if picture is not None:
            shown = ("JPEG", Image.fromarray(picture.numpy()), max(picture.shape))
        bar.update_absolute(done, total, shown)

    return progress
