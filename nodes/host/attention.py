"""The host's attention in the core's signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as host_attention
import torch
from torch import Tensor

from ...retrieval_core.network.unet import AttentionFunction


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """The host's attention."""
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


def choose_attention(base: str) -> AttentionFunction:
    """The attention function for networks of a base."""
    return attend_upcast if base == "sd21" else attend


def bind_attention(extra: dict[str, Any]) -> Callable[..., Tensor]:
    """Binds a layer's options `extra` to the host's attention, as the layer itself calls it."""

    def attend_as_layer(
        q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
    ) -> Tensor:
        how = {"attn_precision": extra.get("attn_precision"), "transformer_options": extra}
        if mask is None:
            return host_attention.optimized_attention(q, k, v, heads, **how)
        return host_attention.optimized_attention_masked(q, k, v, heads, mask=mask.to(q), **how)

    return attend_as_layer
