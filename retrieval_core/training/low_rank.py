"""Low-rank training of frozen layers (LoRA, arXiv 2106.09685), for cards with little memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class LowRankLayer(nn.Module):
    """layer(x) + up(down(x)): a frozen linear or convolution layer and a trained product.

    `up` starts at zero, so that the layer starts as it was.

    Args:
        rank: of the product, limited to what the layer's weight can have.
        generator: of the initial `down`.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        rank = min(rank, *layer.weight.flatten(1).shape)
        if isinstance(layer, nn.Conv2d):
            shape = layer.kernel_size, layer.stride, layer.padding
            self.down: nn.Module = nn.Conv2d(layer.in_channels, rank, *shape, bias=False)
            self.up: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        with torch.no_grad():
            width = layer.weight[0].numel()
            self.down.weight.normal_(generator=generator).mul_(width**-0.5)
            self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def add_low_rank(module: nn.Module, rank: int, generator: torch.Generator) -> None:
    """Replaces every linear and convolution layer in a module by a `LowRankLayer` around it."""
    module.requires_grad_(False)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.Linear, nn.Conv2d)):
                setattr(parent, name, LowRankLayer(child, rank, generator))


def merge_low_rank(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names that they had before `add_low_rank`, the products added in float32."""
    merged = {}
    for name, tensor in weights.items():
        layer, _, part = name.rpartition(".")
        if layer.endswith(".layer"):
            layer = layer.removesuffix(".layer")
            if part == "weight":
                up, down = (weights[f"{layer}.{side}.weight"] for side in ("up", "down"))
                product = up.float().flatten(1) @ down.float().flatten(1)
                tensor = tensor.float() + product.view_as(tensor)
            merged[f"{layer}.{part}"] = tensor
        elif not layer.endswith((".up", ".down")):
            merged[name] = tensor
    return merged
