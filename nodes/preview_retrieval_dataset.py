"""Preview Retrieval Dataset: a data set's contact sheet and figures."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .host import dataset_folder
from .host.dataset_folder import CONNECTED
from .socket_types import CATEGORY, RetrievalDatasetType, make_schema


class RetrievalPreviewDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalPreviewDataset",
            display_name="Preview Retrieval Dataset",
            category=CATEGORY,
            description=(
                "Shows a data set to check by eye, a row of pictures for each outfit with head "
                "boxes and masks drawn in, and counts its characters, artists and outfits."
            ),
            search_aliases=["training data", "contact sheet"],
            is_output_node=True,
            inputs=[
                dataset_folder.make_choice("name"),
                io.Int.Input(
                    "page",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    tooltip="Which characters to show: 0 some from all over the data set, from 1 "
                    "all of them page by page.",
                ),
                RetrievalDatasetType.Input(
                    "dataset", optional=True, tooltip="From Build Retrieval Dataset."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sheet"),
                io.String.Output(
                    display_name="report",
                    tooltip="Pictures, characters, artists, outfits, and pictures with each kind "
                    "of annotation.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str = CONNECTED, **_: Any) -> str:
        """Changes when the data set does, so that one that was replaced is read again."""
        return dataset_folder.describe_choice(name)

    @classmethod
    def execute(cls, name: str, page: int, dataset: Any = None) -> io.NodeOutput:
        from ..retrieval_core.data.data_set import count_stats

        data_set = dataset_folder.choose(name, dataset)
        report = dataset_folder.write_figures(data_set.folder.name, count_stats(data_set))
        sheet = dataset_folder.draw_sheet(data_set, page)
        return io.NodeOutput(sheet, report, ui=dataset_folder.give_sheet(sheet, report, cls))
