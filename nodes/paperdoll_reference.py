"""Paper-Doll Reference: pictures of one paper-doll character, cut to a concept."""

from __future__ import annotations

from comfy_api.latest import io

from .socket_types import CONCEPTS, DEMO_CATEGORY, make_schema

MOST_PICTURES = 16


class RetrievalPaperdollReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalPaperdollReference",
            display_name="Paper-Doll Reference",
            category=DEMO_CATEGORY,
            description=(
                "Draws a character that the demo's networks never saw in training, in varied "
                "poses and places, as references for the demo."
            ),
            search_aliases=["demo", "example images"],
            inputs=[
                io.Int.Input(
                    "character",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    tooltip="Which character: the same number gives the same hair, eyes, skin and "
                    "clothes.",
                ),
                io.Combo.Input(
                    "concept",
                    options=list(CONCEPTS),
                    default="figure",
                    tooltip="What the pictures show: the whole figure, its face (cut at the head "
                    "box), or its clothes (the figure without its head).",
                ),
                io.Int.Input(
                    "pictures",
                    default=4,
                    min=1,
                    max=MOST_PICTURES,
                    tooltip="How many pictures, each with its own pose, expression and background.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                io.Mask.Output(display_name="masks", tooltip="1 where the figure is."),
                io.String.Output(
                    display_name="description", tooltip="The character's true attributes."
                ),
            ],
        )

    @classmethod
    def execute(cls, character: int, concept: str, pictures: int) -> io.NodeOutput:
        from .host.paperdoll_host import draw_references

        return io.NodeOutput(*draw_references(character, concept, pictures))
