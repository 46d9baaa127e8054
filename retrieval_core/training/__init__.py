"""Training: settings, losses, the loop, and checkpoints that survive a killed process."""

from .randomness import derive_step_seed, seed_generator
from .settings import LOCKS, Lock, TrainingSettings, choose_trained_modules
from .trainer import Batches, Trainer, TrainingResult

__all__ = [
    "LOCKS",
    "Batches",
    "Lock",
    "Trainer",
    "TrainingResult",
    "TrainingSettings",
    "choose_trained_modules",
    "derive_step_seed",
    "seed_generator",
]
