"""Hashes a network's weights, so that networks can be told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_SAMPLED = 256


def fingerprint_weights(
    weights: Mapping[str, Tensor], types: Mapping[str, torch.dtype | None] | None = None
) -> str:
    """A hash over names, shapes and evenly spread values of all weights.

    Values are hashed as float16, so that a file loaded as float16 and as float32 has one hash.

    Args:
        types: the type that a weight is used in, where it differs from the stored type.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        flat = tensor.detach().flatten()
        stride = max(1, flat.numel() // _SAMPLED)
        values = flat[::stride][:_SAMPLED].cpu()
        used_as = types.get(name) if types else None
        values = values.to(used_as or values.dtype).to(torch.float16).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
