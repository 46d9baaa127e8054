"""Record Retrieval Map: the model with a recorder of its attention to the references."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .socket_types import CATEGORY, RetrievalMapType, make_schema


class RetrievalRecordMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalRecordMap",
            display_name="Record Retrieval Map",
            category=CATEGORY,
            description=(
                "Put this between Apply Reference Retrieval and the sampler, and Retrieval Map "
                "behind the sampler. The picture stays exactly the same."
            ),
            search_aliases=["attention map", "heatmap"],
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
        from .host.recorder import record_map

        return io.NodeOutput(*record_map(model))
