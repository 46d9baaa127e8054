"""Randomness as a pure function of (seed, step), so that resuming needs no generator state."""

from __future__ import annotations

import numpy as np
import torch

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def derive_step_seed(seed: int, step: int) -> int:
    """A 32-bit seed for one training step.

    torch's CPU generator keeps only 32 bits of its seed; the mix is therefore a bijection of
    the step on 32 bits (MurmurHash3's finaliser), so that no two steps of one run share a seed.
    """
    mixed_seed = _splitmix64(seed & _MASK64)
    value = (step ^ (mixed_seed >> 32)) & _MASK32
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK32
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK32
    return (value ^ (value >> 16)) ^ (mixed_seed & _MASK32)


def seed_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The torch generator of one training step."""
    return torch.Generator(device=device).manual_seed(derive_step_seed(seed, step))


def step_rng(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """The numpy generator of one training step, for data (its words never meet torch's).

    `stream` separates independent uses within one step (an item of the batch, for instance).
    """
    return np.random.default_rng([seed & _MASK64, step, stream])
