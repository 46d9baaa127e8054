"""Layers of the newer host that start without weights, as they do with dynamic VRAM."""

from __future__ import annotations

import torch
from torch import nn


def give_weights(module: nn.Module) -> nn.Module:
    """Zeros for every weight that a layer still lacks, as loading a file would give it."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight is None:
            dtype = layer.weight_comfy_model_dtype
            shape = (layer.out_features, layer.in_features)
            layer.weight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
            if layer.comfy_need_lazy_init_bias:
                bias = torch.zeros(layer.out_features, dtype=dtype)
                layer.bias = nn.Parameter(bias, requires_grad=False)
        elif isinstance(layer, nn.Embedding) and layer.weight.is_meta:
            zeros = torch.zeros(layer.weight.shape, dtype=layer.weight.dtype)
            layer.weight = nn.Parameter(zeros, requires_grad=False)
    return module
