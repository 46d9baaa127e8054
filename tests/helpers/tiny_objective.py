"""The objective of a tiny base, and batches for it that no data set is needed for."""

import torch
from tiny_run import TinyBase, set_up

from retrieval_core.training.task_batches import Batch
from retrieval_core.training.training_run import make_objective


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_batch(count=2, references=2, seed=0, used=True):
    masks = torch.zeros(count, references, 8, 8, dtype=torch.bool)
    masks[..., :5] = True
    content = torch.ones(count, 1, 8, 8)
    content[..., 6:] = 0
    face = torch.zeros(count, 1, 8, 8)
    face[..., 2:4, 1:4] = 1
    return Batch(
        latents=normal(count, 4, 8, 8, seed=seed),
        content=content,
        face=face,
        context=normal(count, 4, 8, seed=seed + 1),
        y=None,
        reference_latents=normal(count, references, 4, 8, 8, seed=seed + 2),
        reference_context=normal(count, references, 4, 8, seed=seed + 3),
        reference_y=None,
        reference_masks=masks,
        used=torch.full((count, references), used),
        parts=None,
        reference_parts=None,
        numbers=torch.arange(count),
        names=[["a", "b"]] * count,
    )


def make(tmp_path, base=None, **changes):
    """An objective whose zero convolutions and low-rank products are not zero."""
    objective = make_objective(set_up(tmp_path, **changes), base or TinyBase())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad and not bool(parameter.any()):
                parameter.normal_(0, 0.05, generator=generator)
    return objective
