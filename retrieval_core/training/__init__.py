"""Training: settings, the loop, checkpoints that survive being killed."""

from .randomness import step_generator, step_rng, step_seed
from .settings import (
    ABLATIONS,
    LOCKS,
    Ablation,
    Lock,
    Task,
    TrainingSettings,
    ablation,
    trained_parts,
)
from .trainer import Batches, Trainer, TrainingResult

__all__ = [
    "ABLATIONS",
    "LOCKS",
    "Ablation",
    "Batches",
    "Lock",
    "Task",
    "Trainer",
    "TrainingResult",
    "TrainingSettings",
    "ablation",
    "step_generator",
    "step_rng",
    "step_seed",
    "trained_parts",
]
