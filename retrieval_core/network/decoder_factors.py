"""The decoder's difference as low-rank products, for small files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_ITERATIONS = 4  # of the randomised decomposition


def factorise_decoder(decoder: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Weights [O, ...] as `<name>.up` [O, r] and `<name>.down` [r, ...], where that is smaller.

    The product is the best approximation of rank r (a truncated singular value decomposition).
    Vectors are stored as they are, and what is zero is left out.
    """
    stored = {}
    for name, weight in decoder.items():
        if not bool(weight.any()):
            continue
        matrix = weight.float().flatten(1) if weight.ndim > 1 else weight
        if weight.ndim == 1 or rank * sum(matrix.shape) >= matrix.numel():
            stored[name] = weight
            continue
        up, sizes, down = _decompose(matrix, rank)
        root = sizes.sqrt()  # on both sides, so that neither leaves the range of float16
        stored[f"{name}.up"] = up * root
        stored[f"{name}.down"] = (down * root).T.reshape(rank, *weight.shape[1:])
    return stored


def _decompose(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular values of a matrix [O, I] and vectors [O, r], [I, r]."""
    # Seeded apart from the global generator: the same weights give the same file.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.svd_lowrank(matrix, q=rank, niter=_ITERATIONS)


def expand_decoder(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `factorise_decoder`, without the weights that are zero."""
    decoder = {}
    for name, tensor in stored.items():
        weight, _, part = name.rpartition(".")
        down = stored.get(f"{weight}.down")
        if part == "up" and down is not None:
            product = tensor.float() @ down.float().flatten(1)
            decoder[weight] = product.view(len(tensor), *down.shape[1:]).to(tensor)
        elif part != "down" or f"{weight}.up" not in stored:
            decoder[name] = tensor
    return decoder


def measure_error(decoder: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> float:
    """Norm of what `factorise_decoder` loses, over the norm of the whole difference."""
    expanded, lost, whole = expand_decoder(stored), 0.0, 0.0
    for name, weight in decoder.items():
        whole += float(weight.float().square().sum())
        if name in expanded:
            lost += float((weight.float() - expanded[name].float()).square().sum())
    return (lost / whole) ** 0.5 if whole else 0.0
