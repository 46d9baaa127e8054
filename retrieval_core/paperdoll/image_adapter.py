"""An adapter of IP-Adapter's kind (arXiv 2308.06721) on the paper-doll base, for comparison.

Each reference becomes a few image tokens. Beside its cross-attention to the text, every such layer
of the frozen base attends to the image tokens with keys and values of its own (decoupled
cross-attention), and both results are added. The image encoder is the base's own encoder, as the
dolls' world has no CLIP.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..network.unet import MIDDLE, TransformerBlock, UNet

# Tokens of a reference -> edge of the grid of features that they are projected from: 4 from one
# mean, as of CLIP's global embedding; 16 from a feature each, as in IP-Adapter's plus variant.
GRIDS = {4: 1, 16: 4}


class ImageAdapter(nn.Module):
    """Projection to image tokens, and keys and values of every cross-attention layer of `unet`.

    Keys and values start as the text's.

    Args:
        unet: the base, which is not changed.
        count: tokens of a reference, 4 or 16.
    """

    def __init__(self, unet: UNet, count: int) -> None:
        super().__init__()
        self.count, self.width = count, unet.config.context_dim
        self.edge = GRIDS[count]
        layers = _list_layers(unet)
        outputs = self.width * count // self.edge**2
        self.project = nn.Linear(unet.config.site_channels()[MIDDLE], outputs)
        self.norm = nn.LayerNorm(self.width)
        self.to_k = nn.ModuleList(copy.deepcopy(layer.to_k) for layer in layers)
        self.to_v = nn.ModuleList(copy.deepcopy(layer.to_v) for layer in layers)
        self.requires_grad_(True)

    def embed(self, unet: UNet, latents: Tensor, context: Tensor, used: Tensor) -> Tensor:
        """Image tokens [G, R * count, width] of references, 0 for those that are not used.

        Args:
            latents: [G * R, C, H, W], clean. context: [G * R, L, D]. used: bool [G, R].
        """
        with torch.no_grad():
            still = torch.zeros(len(latents), device=latents.device)
            emb = unet.embed(still, None, latents.dtype)
            features = unet.encode(latents, emb, context)[-1]
        grid = F.adaptive_avg_pool2d(features, self.edge).flatten(2).transpose(1, 2)
        tokens = self.norm(self.project(grid).reshape(len(latents), self.count, self.width))
        return (tokens * used.flatten()[:, None, None]).reshape(len(used), -1, self.width)

    @contextmanager
    def attached(self, unet: UNet, tokens: Tensor) -> Iterator[None]:
        """Inside the block all cross-attention layers attend to `tokens` [B, N, width], too."""

        def attend(
            number: int, layer: Any, inputs: tuple[Tensor, Tensor], output: Tensor
        ) -> Tensor:
            q, k, v = layer.to_q(inputs[0]), self.to_k[number](tokens), self.to_v[number](tokens)
            shown = layer.attend(q, k, v, layer.heads)
            return output + F.linear(shown, layer.to_out[0].weight)

        hooks = [
            layer.register_forward_hook(partial(attend, number))
            for number, layer in enumerate(_list_layers(unet))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _list_layers(unet: UNet) -> list[Any]:
    return [block.attn2 for block in unet.modules() if isinstance(block, TransformerBlock)]
