"""Retrieval Map: which reference each region of the pictures came from."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .socket_types import CATEGORY, RetrievalMapType, make_schema

STRONGEST, SHARES = "strongest reference", "shares"


class RetrievalMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalMap",
            display_name="Retrieval Map",
            category=CATEGORY,
            description=(
                "Shows which reference each region of the pictures came from: an overlay in one "
                "colour a reference (red, blue, amber, green, violet, teal, pink, brown, and again "
                "from red) and masks. Hover over a picture on the node to see the shares there."
            ),
            search_aliases=["attention map", "heatmap", "attention masks", "which reference"],
            inputs=[
                RetrievalMapType.Input("retrieval_map", tooltip="From Record Retrieval Map."),
                io.Image.Input(
                    "images",
                    tooltip="The pictures that were sampled, decoded; all of the batch.",
                ),
                io.Combo.Input(
                    "masks",
                    options=[STRONGEST, SHARES],
                    default=STRONGEST,
                    tooltip="What the masks hold: white for the one reference that a place looked "
                    "at most, where it looked at references more than at none; or each "
                    "reference's share of its attention.",
                ),
                io.Int.Input(
                    "reference",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Whose masks: 1 is the first reference, in the order in which they "
                    "were added and applied; 0 gives those of all references, picture by picture.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="overlay"),
                io.Mask.Output(display_name="masks"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, retrieval_map: Any, images: Any, masks: str, reference: int) -> io.NodeOutput:
        from .host.map_images import draw_map
        from .host.page_display import show_map

        drawn = draw_map(retrieval_map, images, masks == STRONGEST, reference)
        return io.NodeOutput(*drawn, ui=show_map(retrieval_map, images, cls))
