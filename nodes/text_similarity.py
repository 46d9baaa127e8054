"""Text Similarity: CLIP-T, a score for each image and the mean."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .host import model_folders
from .host.similarity_scores import NAMED, give_score, score_texts
from .socket_types import CATEGORY, list_score_outputs, make_name_input, make_schema


class RetrievalTextSimilarity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalTextSimilarity",
            display_name="Text Similarity (CLIP-T)",
            category=CATEGORY,
            description=(
                "How well each image follows the prompt: the cosine similarity of CLIP's features "
                "of the image and of the text, in percent."
            ),
            search_aliases=["clip-t", "clip score", "evaluate", "metric", "prompt following"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The images to score."),
                io.String.Input(
                    "prompt", default="", multiline=True, tooltip="What the images should show."
                ),
                io.Combo.Input(
                    "encoder",
                    options=[NAMED, *model_folders.list_models(model_folders.CLIP)],
                    default=NAMED,
                    tooltip="What compares them: the folder of a CLIP model in the format of "
                    "transformers, in models/clip_vision or models/text_encoders, or the "
                    "repository below. A checkpoint's own CLIP lacks the half that sees.",
                ),
                make_name_input(
                    "repository",
                    "Hugging Face repository to take CLIP from, for example "
                    "openai/clip-vit-large-patch14; it is downloaded once.",
                ),
                io.Boolean.Input(
                    "prompt_per_line",
                    default=False,
                    optional=True,
                    tooltip="Each line is the prompt of one image, in order; otherwise the whole "
                    "text is the prompt of all.",
                ),
            ],
            outputs=list_score_outputs(),
        )

    @classmethod
    def execute(
        cls,
        images: Any,
        prompt: str,
        encoder: str,
        repository: str = "",
        prompt_per_line: bool = False,
    ) -> io.NodeOutput:
        prompts = [p for p in prompt.splitlines() if p.strip()] if prompt_per_line else [prompt]
        score = score_texts(images, prompts, encoder, repository)
        return give_score("CLIP-T", score, "each its prompt" if len(prompts) > 1 else "one prompt")
