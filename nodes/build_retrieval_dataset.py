"""Build Retrieval Dataset: from a folder of pictures to a data set for training."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .host import dataset_folder
from .socket_types import CATEGORY, RetrievalDatasetType, make_name_input, make_schema


class RetrievalBuildDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalBuildDataset",
            display_name="Build Retrieval Dataset",
            category=CATEGORY,
            description=(
                "Builds a data set that knows the character, artist and outfit of each picture, in "
                f"the folder {dataset_folder.DATASETS}: pictures are filtered by their tags, "
                "near-duplicates and damaged files left out, and every one is counted. Nothing of "
                "the source is modified. A build that was stopped goes on from there."
            ),
            search_aliases=["training data", "danbooru", "gallery-dl", "kohya", "tagging"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "source",
                    default="",
                    tooltip="A folder in the host's input folder or its "
                    f"{dataset_folder.DATASETS}, with a folder for each character, kohya's, "
                    "gallery-dl's or WebDataset's files, or Danbooru metadata.",
                ),
                io.String.Input(
                    "name",
                    default="characters",
                    tooltip="Name of the data set; folder/name makes a subfolder. A data set is "
                    "replaced only by one of the same source and settings.",
                ),
                io.Combo.Input(
                    "outfits",
                    options=["garments", "answers"],
                    default="garments",
                    tooltip="What tells the outfits of a character apart: the garments' colours, "
                    "which need head boxes and masks, or what a VQA model answers.",
                ),
                io.Boolean.Input(
                    "copy_pictures",
                    default=False,
                    tooltip="Copies the pictures into the data set, so that the source can be "
                    "moved; otherwise it refers to them.",
                ),
                make_name_input(
                    "detector_repository",
                    "Hugging Face repository of a model that finds head boxes, for example "
                    "IDEA-Research/grounding-dino-tiny; a box beside a picture goes first. Leave "
                    "empty for those only.",
                ),
                make_name_input(
                    "segmenter_repository",
                    "Hugging Face repository of a SAM model for the figures' masks, for example "
                    "facebook/sam-vit-base; needs the detector. Leave empty for masks beside the "
                    "pictures only.",
                ),
                make_name_input(
                    "parts_repository",
                    "Hugging Face repository of a CLIPSeg model for masks of hair, face and "
                    "clothes, for example CIDAS/clipseg-rd64-refined. Leave empty for those beside "
                    "the pictures only.",
                ),
                make_name_input(
                    "vqa_repository",
                    "Hugging Face repository of a VQA model that tells the clothes' colours, for "
                    "example Salesforce/instructblip-flan-t5-xl, for outfits by answers.",
                ),
            ],
            outputs=[
                RetrievalDatasetType.Output(
                    display_name="dataset", tooltip="For Preview Retrieval Dataset and training."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="How many pictures were seen, kept, and rejected for which reason.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, source: str = "", **_: Any) -> str:
        """Changes when the source's files do, so that the data set is built again."""
        return dataset_folder.describe_source(source) if source else ""

    @classmethod
    def execute(
        cls,
        source: str,
        name: str,
        outfits: str,
        copy_pictures: bool,
        detector_repository: str = "",
        segmenter_repository: str = "",
        parts_repository: str = "",
        vqa_repository: str = "",
    ) -> io.NodeOutput:
        models = {
            "detector": detector_repository,
            "segmenter": segmenter_repository,
            "parts": parts_repository,
            "vqa": vqa_repository,
        }
        data_set, figures = dataset_folder.build(source, name, outfits, copy_pictures, models)
        report = dataset_folder.write_figures(data_set.folder.name, figures)
        sheet = dataset_folder.draw_sheet(data_set)
        shown = dataset_folder.give_sheet(sheet, report, cls)
        return io.NodeOutput(data_set, report, ui=shown)
