"""Apply Reference Retrieval: the model retrieves from references while it draws."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..retrieval_core.sampling.presets import BALANCED, PRESETS
from .socket_types import (
    ADVANCED,
    CATEGORY,
    ReferencesType,
    RetrievalControlsType,
    find_refusal,
    make_factor_input,
    make_percent_input,
    make_schema,
)

RECOMMENDED = "recommended"


class RetrievalApplyReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalApplyReferences",
            display_name="Apply Reference Retrieval",
            category=CATEGORY,
            description=(
                "Lets the model retrieve from the references while it draws. Strength 0 is the "
                "model unchanged. Apply twice, with two regions, for two characters."
            ),
            search_aliases=[
                "apply ipadapter",
                "ip-adapter plus",
                "reference only",
                "consistent character",
                "faceid",
                "instantid",
                "retribooru",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The base model; it is not changed."),
                ReferencesType.Input(
                    "references",
                    lazy=True,
                    tooltip="From Encode References; not read at strength 0.",
                ),
                make_factor_input(
                    "strength",
                    "How strongly the references act: 1 is what the network's file "
                    "recommends, 0 switches retrieval off.",
                ),
                make_percent_input(
                    "start_percent", 0.0, "The part of sampling at which retrieval starts."
                ),
                make_percent_input(
                    "end_percent",
                    1.0,
                    "The part of sampling at which retrieval ends; not before the start.",
                ),
                io.Combo.Input(
                    "guidance",
                    options=[RECOMMENDED, "cond", "both"],
                    default=RECOMMENDED,
                    tooltip="Which prompts retrieve: cond is the positive prompt only, so that "
                    "CFG strengthens the references; both is gentler. The network's file "
                    "recommends one.",
                    extra_dict=ADVANCED,
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
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=BALANCED,
                    optional=True,
                    tooltip="What gives way where the prompt and the references disagree, and how "
                    "much of the references' detail is kept.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def validate_inputs(cls, start_percent: float | None, end_percent: float | None) -> bool | str:
        """Refuses before queueing a start behind the end; a linked value is None."""
        from ..retrieval_core.bank.site_bank import Bank
        from ..retrieval_core.sampling.applications import Application

        if start_percent is None or end_percent is None:
            return True
        return find_refusal(lambda: Application(Bank(), start=start_percent, end=end_percent))

    @classmethod
    def check_lazy_status(cls, strength: float, references: Any = None, **_: Any) -> list[str]:
        """References that will not act are not encoded."""
        return ["references"] if references is None and strength != 0 else []

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
        preset: str = BALANCED,
    ) -> io.NodeOutput:
        from .host.apply import apply_references

        if references is None:  # see check_lazy_status
            return io.NodeOutput(model)
        rows = None if guidance == RECOMMENDED else guidance
        patched = apply_references(
            model, references, strength, start_percent, end_percent, rows, region, controls, preset
        )
        return io.NodeOutput(patched)
