"""Image Similarity, Text Similarity and Paper-Doll Match: a score an image, and the mean."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .host import model_folders
from .paperdoll_nodes import CATEGORY as DEMO_CATEGORY
from .socket_types import CATEGORY, ImageScoresType

CLIP_I, DINO_I = "CLIP-I", "DINO-I"
CONNECTED = "connected CLIP_VISION"
NAMED = "named repository"
EVERYTHING, FACE, CLOTHES = "face and clothes", "face", "clothes"


def _outputs() -> list[io.Output]:
    return [
        io.Float.Output(display_name="score", tooltip="The mean, in percent."),
        io.String.Output(
            display_name="report",
            tooltip="The mean with its standard error, and the value of each image.",
        ),
        ImageScoresType.Output(
            display_name="similarity",
            tooltip="The value of each image, for VQA Diversity Score.",
        ),
    ]


def _given(title: str, score: Any, against: str) -> io.NodeOutput:
    from .host.scoring import report

    text = report(title, score, against)
    return io.NodeOutput(score.estimate.mean, text, score, ui=ui.PreviewText(text))


class RetrievalImageSimilarity(io.ComfyNode):
    """CLIP-I or DINO-I."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RetrievalImageSimilarity",
            display_name="Image Similarity (CLIP-I, DINO-I)",
            category=CATEGORY,
            description=(
                "How much each image looks like the references: the mean cosine similarity of "
                "CLIP's or DINO's features, in percent."
            ),
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
                        *model_folders.model_folders(model_folders.CLIP, model_folders.DINO),
                    ],
                    default=CONNECTED,
                    tooltip="What reads the images: the CLIP_VISION that is connected (a DINOv2 "
                    "for DINO-I), or a model's folder in the format of transformers, in "
                    "models/clip_vision, models/text_encoders or models/dino. Not used if a "
                    "repository is given.",
                ),
                io.String.Input(
                    "repository",
                    default="",
                    optional=True,
                    tooltip="Hugging Face repository to take the encoder from, for example "
                    "openai/clip-vit-large-patch14 or facebook/dino-vits16; it is downloaded once.",
                ),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="From Load CLIP Vision."),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        images: Any,
        references: Any,
        measure: str,
        encoder: str,
        repository: str = "",
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        from .host.similarity import image_scores

        score = image_scores(
            images, references, measure == DINO_I, encoder, repository, clip_vision
        )
        return _given(measure, score, f"{len(references)} references")


class RetrievalTextSimilarity(io.ComfyNode):
    """CLIP-T."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RetrievalTextSimilarity",
            display_name="Text Similarity (CLIP-T)",
            category=CATEGORY,
            description=(
                "How well each image follows the prompt: the cosine similarity of CLIP's features "
                "of the image and of the text, in percent."
            ),
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The images to score."),
                io.String.Input(
                    "prompt", default="", multiline=True, tooltip="What the images should show."
                ),
                io.Combo.Input(
                    "encoder",
                    options=[NAMED, *model_folders.model_folders(model_folders.CLIP)],
                    default=NAMED,
                    tooltip="What compares them: the folder of a CLIP model in the format of "
                    "transformers, in models/clip_vision or models/text_encoders, or the "
                    "repository below. A checkpoint's own CLIP lacks the half that sees.",
                ),
                io.String.Input(
                    "repository",
                    default="",
                    optional=True,
                    tooltip="Hugging Face repository to take CLIP from, for example "
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
            outputs=_outputs(),
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
        from .host.similarity import text_scores

        prompts = [p for p in prompt.splitlines() if p.strip()] if prompt_per_line else [prompt]
        score = text_scores(images, prompts, encoder, repository)
        return _given("CLIP-T", score, "each its prompt" if len(prompts) > 1 else "one prompt")


class RetrievalPaperdollMatch(io.ComfyNode):
    """The attribute match of the paper-doll world."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RetrievalPaperdollMatch",
            display_name="Paper-Doll Match",
            category=DEMO_CATEGORY,
            description=(
                "Which share of a paper-doll character's attributes came over from the references "
                "to each picture, in percent, as the bundled judge reads them."
            ),
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "images", tooltip="Pictures of the paper-doll model, before they are enlarged."
                ),
                io.Int.Input(
                    "character",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    tooltip="The number in Paper-Doll Reference, of the character or of its face.",
                ),
                io.Int.Input(
                    "clothes_character",
                    default=-1,
                    min=-1,
                    max=0xFFFFFFFF,
                    optional=True,
                    tooltip="The number of the character whose clothes were given; -1 if they are "
                    "the same character's.",
                ),
                io.Combo.Input(
                    "attributes",
                    options=[EVERYTHING, FACE, CLOTHES],
                    default=EVERYTHING,
                    optional=True,
                    tooltip="What must match: hair and eyes, garments, or both.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        images: Any,
        character: int,
        clothes_character: int = -1,
        attributes: str = EVERYTHING,
    ) -> io.NodeOutput:
        from .host.similarity import match_scores

        wearer = character if clothes_character < 0 else clothes_character
        wanted = {EVERYTHING: (True, True), FACE: (True, False), CLOTHES: (False, True)}
        score = match_scores(images, character, wearer, *wanted[attributes])
        return _given("Paper-doll match", score, f"{attributes} of the character")
