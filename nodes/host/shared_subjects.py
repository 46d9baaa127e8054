"""Consistent Pictures: the pictures of a batch share their subject in the host's U-Net."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...retrieval_core.network.unet import UNetConfig
from ...retrieval_core.sampling.applications import COND
from ...retrieval_core.training_free.consistent_batch import (
    ConsistentBatch,
    count_values,
    list_shared_blocks,
)
from . import step_context
from .base_model import detect_base
from .step_context import StepContext, chunk_kinds


class SharedSubjects:
    """An output_block_patch that shares the subjects of the positive prompts' rows.

    The host gives each prompt the whole batch of latents, also where memory or area conditionings
    split the prompts: rows of one prompt are the pictures of the batch. Clones of a model use one
    object, which holds no state.
    """

    def __init__(self, config: UNetConfig, batch: ConsistentBatch):
        self.config, self.batch = config, batch
        self.blocks = list_shared_blocks(config)

    def __deepcopy__(self, memo: dict) -> SharedSubjects:
        return self

    @torch.compiler.disable
    def __call__(self, h: Tensor, hsp: Tensor, to: dict) -> tuple[Tensor, Tensor]:
        kind, index = to["block"]
        context: StepContext | None = to.get(step_context.STEP)
        if kind != "output" or index not in self.blocks:
            return h, hsp
        if context is not None and not context.within(self.batch.start, self.batch.end):
            return h, hsp
        kinds = chunk_kinds(to, context)
        chunks = zip(kinds, h.chunk(len(kinds)), strict=True)
        shared = [self.batch.share(rows) if kind == COND else rows for kind, rows in chunks]
        return torch.cat(shared), hsp

    def cleanup(self, *_: Any) -> None:
        """See `step_context.attach`: there is nothing to free."""

    def nbytes(self, noise_shape: Any, dtype: torch.dtype) -> int:
        """Bytes that sampling needs for noise_shape [B, C, H, W]."""
        return int(count_values(self.config, noise_shape) * torch.float32.itemsize)


def share_subjects(
    model: Any, strength: float, anchors: int = 0, start: float = 0.0, end: float = 1.0
) -> Any:
    """A clone of a MODEL whose batches share their subject; the input model is left as it was.

    Args:
        strength, anchors, start, end: see `ConsistentBatch`; strength 0 is the model unchanged.

    Raises:
        RetrievalError: an unsupported model, or see `ConsistentBatch`.
    """
    batch, base = ConsistentBatch(strength, start, end, anchors), detect_base(model)
    patched = model.clone()
    if strength > 0:
        patch = SharedSubjects(base.config, batch)
        patched.set_model_output_block_patch(patch)
        step_context.attach(patched, patch)
    return patched
