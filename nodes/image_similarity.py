"""Image Similarity: CLIP-I or DINO-I, a score for each image and the mean."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .host import model_folders
from .host.similarity_scores import CONNECTED, give_score, score_images
from .socket_types import CATEGORY, list_score_outputs, make_name_input, make_schema

CLIP_I, DINO_I = "CLIP-I", "DINO-I"


class RetrievalImageSimilarity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalImageSimilarity",
            display_name="Image Similarity (CLIP-I, DINO-I)",
            category=CATEGORY,
            description=(
                "How much each image looks like the references: the mean cosine similarity of "
                "CLIP's or DINO's features, in percent."
            ),
            search_aliases=["clip-i", "dino-i", "clip score", "evaluate", "metric", "likeness"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The images to score."),
                io.Image.Input("references", tooltip="The images of what they should show."),
                io.Combo.Input(
                    "measure",
                    options=[CLIP_I, DINO_I],
                    default=CLIP_I,
                    tooltip="CLIP-I compares what is shown; DINO-I is stricter on the very same "
                    "subject.",
                ),
                io.Combo.Input(
                    "encoder",
                    options=[
                        CONNECTED,
                        *model_folders.list_models(model_folders.CLIP, model_folders.DINO),
                    ],
                    default=CONNECTED,
                    tooltip="What reads the images: the CLIP_VISION that is connected (a DINOv2 "
                    "for DINO-I), or a model's folder in the format of transformers, in "
                    "models/clip_vision, models/text_encoders or models/dino. Not used if a "
                    "repository is given.",
                ),
                make_name_input(
                    "repository",
                    "Hugging Face repository to take the encoder from, for example "
                    "openai/clip-vit-large-patch14 or facebook/dino-vits16; it is downloaded once.",
                ),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="From Load CLIP Vision."),
            ],
            outputs=list_score_outputs(),
        )

    @classmethod
    def execute(
        cls, images: Any, references: Any, measure: str, encoder: str, **optional: Any
    ) -> io.NodeOutput:
        score = score_images(images, references, measure == DINO_I, encoder, **optional)
        return give_score(measure, score, f"{len(references)} references")
