"""Retrieval Controls: finer settings of Apply Reference Retrieval."""

from __future__ import annotations

from comfy_api.latest import io

from ..retrieval_core.bank.token_budget import AUTOMATIC, LEAST_AUTOMATIC
from ..retrieval_core.sampling.controls import (
    CURVES,
    GROUP_PRESETS,
    GROUPS,
    StrengthCurve,
    parse_curve,
)
from .socket_types import (
    ADVANCED,
    CATEGORY,
    RetrievalControlsType,
    find_refusal,
    make_factor_input,
    make_schema,
)

NUMBERS, CUSTOM = "numbers", "custom"
LIMITED, ALL_TOKENS = "up to the budget", "all"


class RetrievalControls(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalControls",
            display_name="Retrieval Controls",
            category=CATEGORY,
            description=(
                "Shapes how references act: when in sampling, on what (composition or detail), how "
                "softly a region ends, and how many tokens are looked at. For Apply Reference "
                "Retrieval."
            ),
            search_aliases=[
                "ipadapter weight type",
                "weight schedule",
                "strength curve",
                "style and composition",
                "regional prompting",
            ],
            inputs=[
                io.Combo.Input(
                    "strength_curve",
                    options=[*CURVES, NUMBERS],
                    default="constant",
                    tooltip="The strength between start and end: constant; ease in, from 0 up to "
                    "full; ease out, from full down to 0; ease in and out; or the numbers below.",
                ),
                io.String.Input(
                    "curve_numbers",
                    default="1, 1",
                    tooltip="For 'numbers': factors of the strength with commas between, spread "
                    "evenly from start to end, with straight lines between, as in 1, 0.5, 0.",
                ),
                io.Combo.Input(
                    "act_on",
                    options=[*GROUP_PRESETS, CUSTOM],
                    default="all",
                    tooltip="What the references act on: composition is the middle block and the "
                    "coarsest sites, detail the finest, middle those between; or the three factors "
                    "below.",
                ),
                *(
                    make_factor_input(
                        group,
                        f"For 'custom': the factor of the strength at the sites of {group}.",
                        extra_dict=ADVANCED,
                    )
                    for group in GROUPS
                ),
                io.Float.Input(
                    "region_blur",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="Softens the region's edges, in pixels of the region's mask; 0 leaves "
                    "them as painted.",
                ),
                io.Combo.Input(
                    "tokens",
                    options=[AUTOMATIC, LIMITED, ALL_TOKENS],
                    default=AUTOMATIC,
                    tooltip="How much of the references is looked at. Automatic: tokens that are "
                    "alike are merged, to about as many as one reference has, so that a step costs "
                    "the same for any number of references. Up to the budget: to the number below. "
                    "All: nothing is merged, and every reference costs.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "token_budget",
                    default=LEAST_AUTOMATIC,
                    min=1,
                    max=1 << 20,
                    tooltip="For 'up to the budget': the most tokens at a site, of all references "
                    "together: less is faster, more keeps finer differences.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "keep_apart",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="With a region: until this part of sampling it is kept apart from "
                    "other regions that are kept apart too, so that the model itself does not mix "
                    "their characters. 0 never; 0.5 lets them blend in the second half; 1 to the "
                    "end.",
                ),
            ],
            outputs=[RetrievalControlsType.Output(display_name="controls")],
        )

    @classmethod
    def validate_inputs(cls, strength_curve: str | None, curve_numbers: str | None) -> bool | str:
        """Refuses before queueing a curve that is none; a linked value is None."""
        return find_refusal(lambda: read_curve(strength_curve, curve_numbers))

    @classmethod
    def execute(
        cls,
        strength_curve: str,
        curve_numbers: str,
        act_on: str,
        composition: float,
        middle: float,
        detail: float,
        region_blur: float,
        tokens: str,
        token_budget: int,
        keep_apart: float = 0.0,
    ) -> io.NodeOutput:
        from ..retrieval_core.sampling.controls import Controls

        custom = (composition, middle, detail)
        budget = {AUTOMATIC: AUTOMATIC, LIMITED: token_budget, ALL_TOKENS: None}[tokens]
        curve = read_curve(strength_curve, curve_numbers)
        groups = custom if act_on == CUSTOM else GROUP_PRESETS[act_on]
        return io.NodeOutput(Controls(curve, groups, region_blur, budget, keep_apart))


def read_curve(strength_curve: str | None, curve_numbers: str | None) -> StrengthCurve | None:
    """The curve that the two inputs say; None if the one that counts is linked."""
    text = curve_numbers if strength_curve == NUMBERS else strength_curve
    return None if text is None else parse_curve(text)
