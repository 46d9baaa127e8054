"""Record Retrieval Map and Retrieval Map."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .socket_types import CATEGORY, RetrievalMapType

STRONGEST, SHARES = "strongest reference", "shares"


class RetrievalRecordMap(io.ComfyNode):
    """The model, noting while it draws which reference each place looks at."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RetrievalRecordMap",
            display_name="Record Retrieval Map",
            category=CATEGORY,
            description=(
                "Put this between Apply Reference Retrieval and the sampler, and Retrieval Map "
                "behind the sampler. The picture stays exactly the same."
            ),
            inputs=[
                io.Model.Input("model", tooltip="From the last Apply Reference Retrieval."),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                RetrievalMapType.Output(
                    display_name="retrieval_map",
                    tooltip="Filled by the sampler; the last one, if several use the model.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        from .host.recorder import record

        return io.NodeOutput(*record(model))


class RetrievalMap(io.ComfyNode):
    """Which reference each region of the pictures came from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RetrievalMap",
            display_name="Retrieval Map",
            category=CATEGORY,
            description=(
                "Shows which reference each region of the pictures came from: an overlay in one "
                "colour a reference (red, blue, amber, green, violet, teal, pink, brown, and again "
                "from red) and masks."
            ),
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
        )

    @classmethod
    def execute(cls, retrieval_map: Any, images: Any, masks: str, reference: int) -> io.NodeOutput:
        from .host.map_images import draw

        return io.NodeOutput(*draw(retrieval_map, images, masks == STRONGEST, reference))
