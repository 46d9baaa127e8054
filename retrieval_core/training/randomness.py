"""Randomness as a function of seed and step, so that resuming needs no generator state."""

from __future__ import annotations

import numpy as np
import torch


def derive_step_seed(seed: int, step: int) -> int:
    """The 64-bit seed of one training step."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


def seed_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The torch generator of one training step."""
    return torch.Generator(device=device).manual_seed(derive_step_seed(seed, step))
