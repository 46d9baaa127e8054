"""The host's attention in the core's signature."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.ldm.modules.attention as host_attention
import torch
from torch import Tensor

from ...retrieval_core.network.unet import AttentionFunction


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """The host's attention with its own options."""
    if mask is None:
        return host_attention.optimized_attention(q, k, v, heads, **options)
    return host_attention.optimized_attention_masked(q, k, v, heads, mask=mask.to(q), **options)


def choose_attention(base: str) -> AttentionFunction:
    """The attention function for networks of a base; SD 2.x overflows in half precision but for
    logits in float32."""
    return partial(attend, attn_precision=torch.float32) if base == "sd21" else attend


def bind_attention(extra: dict[str, Any]) -> Callable[..., Tensor]:
    """Binds a layer's options `extra` to the host's attention, as the layer itself calls it."""
    precision = extra.get("attn_precision")
    return partial(attend, attn_precision=precision, transformer_options=extra)
