"""Paper-Doll Match: the percentage of a character's attributes found in each picture."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .socket_types import DEMO_CATEGORY, list_score_outputs, make_schema

EVERYTHING, FACE, CLOTHES = "face and clothes", "face", "clothes"


class RetrievalPaperdollMatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalPaperdollMatch",
            display_name="Paper-Doll Match",
            category=DEMO_CATEGORY,
            description=(
                "Which share of a paper-doll character's attributes came over from the references "
                "to each picture, in percent, as the bundled judge reads them."
            ),
            search_aliases=["demo", "evaluate", "metric"],
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
            outputs=list_score_outputs(),
        )

    @classmethod
    def execute(
        cls,
        images: Any,
        character: int,
        clothes_character: int = -1,
        attributes: str = EVERYTHING,
    ) -> io.NodeOutput:
        from .host.paperdoll_scores import score_matches
        from .host.similarity_scores import give_score

        wearer = character if clothes_character < 0 else clothes_character
        wanted = {EVERYTHING: (True, True), FACE: (True, False), CLOTHES: (False, True)}
        score = score_matches(images, character, wearer, *wanted[attributes])
        return give_score("Paper-doll match", score, f"{attributes} of the character")
