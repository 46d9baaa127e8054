"""VQA Diversity Score: how different the answers on the images of one conditioning are."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..retrieval_core.metrics.vqa import DEFAULT_QUESTIONS
from ..retrieval_core.metrics.vqa_models import BATCH, MAX_NEW_TOKENS
from .host import model_folders
from .host.vqa_asking import AUTOMATIC, JUDGE, WORDS, score_diversity
from .socket_types import ADVANCED, CATEGORY, ImageScoresType, make_name_input, make_schema


class RetrievalVQADiversityScore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalVQADiversityScore",
            display_name="VQA Diversity Score",
            category=CATEGORY,
            description=(
                "Asks a visual question answering model about each image of a batch that was made "
                "from one conditioning, and averages how different the answers are, in percent."
            ),
            search_aliases=["diversity", "evaluate", "metric"],
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="A batch of at least two images, made from one prompt and the same "
                    "references with different noise.",
                ),
                io.Combo.Input(
                    "vqa_model",
                    options=[JUDGE, *model_folders.list_models(model_folders.VQA)],
                    default=JUDGE,
                    tooltip="Who answers: a folder of models/VQA or models/LLM in the format of "
                    "transformers; or the judge that comes with the pack, for pictures of the "
                    "paper-doll demo only. Not used if a repository is given.",
                ),
                io.String.Input(
                    "questions",
                    default="\n".join(DEFAULT_QUESTIONS),
                    multiline=True,
                    tooltip="What to ask, one question a line; the score is the mean over them.",
                ),
                make_name_input(
                    "vqa_repository",
                    "Hugging Face repository to take the VQA model from, as owner/name, "
                    "for example Salesforce/blip-vqa-base; it is downloaded once. Leave empty for "
                    "the model above.",
                ),
                io.Combo.Input(
                    "answer_encoder",
                    options=[
                        AUTOMATIC,
                        WORDS,
                        *model_folders.list_models(model_folders.CLIP),
                    ],
                    default=AUTOMATIC,
                    optional=True,
                    tooltip="What compares the answers: automatic is the CLIP that is connected, "
                    "or words for the judge; words counts the words that two answers share; or "
                    "the folder of a CLIP model in the format of transformers. Scores of "
                    "different encoders are not comparable.",
                ),
                make_name_input(
                    "encoder_repository",
                    "Hugging Face repository of a CLIP model to compare the answers with, "
                    "for example openai/clip-vit-large-patch14. Leave empty for the encoder above.",
                ),
                io.Int.Input(
                    "max_new_tokens",
                    default=MAX_NEW_TOKENS,
                    min=1,
                    max=1024,
                    optional=True,
                    tooltip="The longest answer, in tokens; CLIP reads 77 of them.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "batch_size",
                    default=BATCH,
                    min=1,
                    max=256,
                    optional=True,
                    tooltip="How many images the VQA model sees at a time; less takes less memory.",
                    extra_dict=ADVANCED,
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The CLIP of an SD or SDXL checkpoint, to compare the answers with.",
                ),
                ImageScoresType.Input(
                    "similarity",
                    optional=True,
                    tooltip="One value an image, from Image Similarity, Text Similarity or "
                    "Paper-Doll Match: gives the weighted score too, in which images that are "
                    "off the mark count less.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="score", tooltip="In percent."),
                io.String.Output(
                    display_name="report",
                    tooltip="The scores with their standard errors, and every answer.",
                ),
                io.Image.Output(
                    display_name="distance_plot",
                    tooltip="The distance of each image to each other.",
                ),
                io.Image.Output(display_name="most_alike", tooltip="A batch of two."),
                io.Image.Output(display_name="least_alike", tooltip="A batch of two."),
                io.Float.Output(
                    display_name="weighted_score",
                    tooltip="In percent; nan where no similarity is connected.",
                ),
            ],
        )

    @classmethod
    def execute(cls, images: Any, vqa_model: str, questions: str, **settings: Any) -> io.NodeOutput:
        scored = score_diversity(images, vqa_model, questions, **settings)
        plot = scored[2]
        return io.NodeOutput(*scored, ui=ui.PreviewImage(plot, cls=cls))
