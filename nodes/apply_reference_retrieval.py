"""Apply Reference Retrieval: the model retrieves from references while it draws."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .socket_types import CATEGORY, ReferencesType, RetrievalControlsType, make_factor_input

RECOMMENDED = "recommended"


class RetrievalApplyReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RetrievalApplyReferences",
            display_name="Apply Reference Retrieval",
            category=CATEGORY,
            description=(
                "Lets the model retrieve from the references while it draws. Strength 0 is the "
                "model unchanged. Apply twice, with two regions, for two characters."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The base model; it is not changed."),
                ReferencesType.Input("references", tooltip="From Encode References."),
                make_factor_input(
                    "strength",
                    "How strongly the references act: 1 is what the network's file "
                    "recommends, 0 switches retrieval off.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="The part of sampling at which retrieval starts.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="The part of sampling at which retrieval ends; not before the start.",
                ),
                io.Combo.Input(
                    "guidance",
                    options=[RECOMMENDED, "cond", "both"],
                    default=RECOMMENDED,
                    tooltip="Which prompts retrieve: cond is the positive prompt only, so that "
                    "CFG strengthens the references; both is gentler. The network's file "
                    "recommends one.",
                ),
                io.Mask.Input(
                    "region",
                    optional=True,
                    tooltip="White where in the picture the references may appear; of any size.",
                ),
                RetrievalControlsType.Input(
                    "controls",
                    optional=True,
                    tooltip="From Retrieval Controls: the strength over the steps and by kind of "
                    "site, the region's edges, the token budget. Without it, their defaults.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        references: Any,
        strength: float,
        start_percent: float,
        end_percent: float,
        guidance: str,
        region: Any = None,
        controls: Any = None,
    ) -> io.NodeOutput:
        from .host.apply import apply_references

        rows = None if guidance == RECOMMENDED else guidance
        patched = apply_references(
            model, references, strength, start_percent, end_percent, rows, region, controls
        )
        return io.NodeOutput(patched)
