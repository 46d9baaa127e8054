"""The pack's own socket types and categories, and the inputs and outputs that nodes share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..retrieval_core.errors import RetrievalError

CATEGORY, DEMO_CATEGORY = "retrieval", "retrieval/demo"
CONCEPTS = ("figure", "face", "clothes")

RetrievalControlNetType = io.Custom("RETRIEVAL_CONTROLNET")
ReferencesType = io.Custom("RETRIEVAL_REFERENCES")
RetrievalControlsType = io.Custom("RETRIEVAL_CONTROLS")
RetrievalMapType = io.Custom("RETRIEVAL_MAP")
RetrievalDatasetType = io.Custom("RETRIEVAL_DATASET")
# Of `retrieval_core.metrics.ImageScore`: a value for each image, in percent.
ImageScoresType = io.Custom("RETRIEVAL_IMAGE_SCORES")

# For `extra_dict` of inputs that few need, which the frontend folds away. The argument `advanced`
# does the same, but 0.8.0 lacks it.
ADVANCED = {"advanced": True}


def make_schema(**described: Any) -> io.Schema:
    """A node's schema; fields that the host's version does not know are left out."""
    known = {field.name for field in fields(io.Schema)}
    return io.Schema(**{name: value for name, value in described.items() if name in known})


def make_factor_input(name: str, tooltip: str, **more: Any) -> io.Float.Input:
    """An input of 0 to 10, by default 1, with `more` arguments of the host's."""
    return io.Float.Input(name, default=1.0, min=0.0, max=10.0, step=0.05, tooltip=tooltip, **more)


def make_percent_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    """An input of a part of sampling, 0 to 1."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.001, tooltip=tooltip)


def make_name_input(name: str, tooltip: str) -> io.String.Input:
    """An optional input of a repository of the hub or of something in it, by default empty."""
    return io.String.Input(name, default="", optional=True, tooltip=tooltip)


def find_refusal(check: Callable[[], Any]) -> bool | str:
    """What `validate_inputs` answers: True, or the sentence with which a check refuses."""
    try:
        check()
    except RetrievalError as error:
        return str(error)
    return True


def list_score_outputs() -> list[io.Output]:
    """The outputs of the nodes that score each image."""
    return [
        io.Float.Output(display_name="score", tooltip="The mean, in percent."),
        io.String.Output(
            display_name="report",
            tooltip="The mean with its standard error, and the value of each image.",
        ),
        ImageScoresType.Output(
            display_name="similarity",
            tooltip="The value of each image, for VQA Diversity Score.",
        ),
    ]
