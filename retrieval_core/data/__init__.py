"""Data: annotated pictures, concepts cut from them, augmentation, and the tasks of §3.3."""

from .augment import RandomView, View
from .concepts import cut_reference
from .data_set import DataSet, open_data_set
from .sample import NEUTRAL, Reference, Sample
from .tasks import TaskOptions, TrainingItem, draw_composition, draw_item, draw_same_character

__all__ = [
    "NEUTRAL",
    "DataSet",
    "RandomView",
    "Reference",
    "Sample",
    "TaskOptions",
    "TrainingItem",
    "View",
    "cut_reference",
    "draw_composition",
    "draw_item",
    "draw_same_character",
    "open_data_set",
]
