"""Consistent Pictures: the pictures of a batch show one character, without any reference."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..retrieval_core.training_free.consistent_batch import END, START, STRENGTH, ConsistentBatch
from .socket_types import CATEGORY, find_refusal, make_percent_input, make_schema

MOST_ANCHORS = 64


class RetrievalConsistentPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalConsistentPictures",
            display_name="Consistent Pictures",
            category=CATEGORY,
            description=(
                "For a new character: the pictures of a batch look at each other's subject while "
                "they are drawn, so that they show the same character. No reference, no network. "
                "Strength 0, or a batch of one, is the model unchanged."
            ),
            search_aliases=[
                "consistory",
                "storydiffusion",
                "consistent character",
                "same character",
                "character sheet",
                "consistent self-attention",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The base model; it is not changed."),
                io.Float.Input(
                    "strength",
                    default=STRENGTH,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of its subject each picture takes from the others: 1 is "
                    "most alike, 0 switches it off.",
                ),
                io.Int.Input(
                    "anchors",
                    default=0,
                    min=0,
                    max=MOST_ANCHORS,
                    tooltip="0: every picture looks at all others. A number: all look only at the "
                    "first so many pictures. With 1 the first picture stays what it is without "
                    "this node, and the others follow it.",
                ),
                make_percent_input(
                    "start_percent",
                    START,
                    "The part of sampling at which the pictures start to look at each "
                    "other; later leaves poses that no prompt names more different.",
                ),
                make_percent_input(
                    "end_percent",
                    END,
                    "The part of sampling at which they stop; later is more alike, earlier "
                    "follows the prompts better. Not before the start.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def validate_inputs(cls, start_percent: float | None, end_percent: float | None) -> bool | str:
        """Refuses before queueing a start behind the end; a linked value is None."""
        if start_percent is None or end_percent is None:
            return True
        return find_refusal(lambda: ConsistentBatch(start=start_percent, end=end_percent))

    @classmethod
    def execute(
        cls, model: Any, strength: float, anchors: int, start_percent: float, end_percent: float
    ) -> io.NodeOutput:
        from .host.shared_subjects import share_subjects

        return io.NodeOutput(share_subjects(model, strength, anchors, start_percent, end_percent))
