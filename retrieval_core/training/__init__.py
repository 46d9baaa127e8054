"""Training: settings, the loop, checkpoints that survive being killed."""

from .randomness import derive_step_seed, seed_generator, step_rng
from .settings import (
    ABLATIONS,
    LOCKS,
    Ablation,
    Lock,
    Task,
    TrainingSettings,
    ablation,
    choose_trained_parts,
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
    "choose_trained_parts",
    "derive_step_seed",
    "seed_generator",
    "step_rng",
]
