"""Data: annotated pictures, concepts cut from them, augmentation, and the tasks of §3.3."""

from .augment import Augmentation, ColourJitter, RandomView, View
from .concepts import clothes_reference, cut_reference, face_reference, figure_reference
from .sample import NEUTRAL, Reference, Sample
from .tasks import TaskOptions, TrainingItem, draw_composition, draw_same_character

__all__ = [
    "NEUTRAL",
    "Augmentation",
    "ColourJitter",
    "RandomView",
    "Reference",
    "Sample",
    "TaskOptions",
    "TrainingItem",
    "View",
    "clothes_reference",
    "cut_reference",
    "draw_composition",
    "draw_same_character",
    "face_reference",
    "figure_reference",
]
