"""Batches of the two tasks (§3.3) from cached latents and prompt embeddings.

Which items a step trains on is a function of the seed and the step alone: any number of processes,
and a resumed run, get the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """B targets, each with R references; floating-point tensors are float16 as they are cached.

    Attributes:
        latents: [B, 4, h, w] clean latents of the targets.
        content, face: [B, h, w], share of each latent pixel in the picture (not in its padding) and
            in the face box, 0 to 1; `face` is 0 without a head box.
        context, y: [B, L, D] and [B, A] of the prompts, the empty prompt's where text is dropped.
        reference_latents: [B, R, 4, h, w], 0 where references are dropped.
        reference_context, reference_y: [B, R, L, D] and [B, R, A] of the references' concepts.
        reference_masks: bool [B, R, h, w], True on what is to be retrieved.
        used: bool [B, R], False where references are dropped.
        numbers: int64 [B], the number of each item in the run, the same for any number of
            processes; for seeding its noise.
        names: of each item, the pictures of its target and of its references.
        y and reference_y are None where the base has no vector conditioning.
    """

    latents: Tensor
    content: Tensor
    face: Tensor
    context: Tensor
    y: Tensor | None
    reference_latents: Tensor
    reference_context: Tensor
    reference_y: Tensor | None
    reference_masks: Tensor
    used: Tensor
    numbers: Tensor
    names: list[list[str]]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """The batch on a device, its floating-point tensors as `dtype`."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{k: move(v) if isinstance(v, Tensor) else v for k, v in values.items()})

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the data loader."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        pinned = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in values.items()}
        return Batch(**pinned)
