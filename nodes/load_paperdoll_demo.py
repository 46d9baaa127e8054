"""Load Paper-Doll Demo Model: the bundled base as MODEL, CLIP and VAE, and a latent."""

from __future__ import annotations

from comfy_api.latest import io

from .socket_types import DEMO_CATEGORY, make_schema

LARGEST_BATCH = 64
MOST_FIGURES = 4


class RetrievalPaperdollModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalPaperdollModel",
            display_name="Load Paper-Doll Demo Model",
            category=DEMO_CATEGORY,
            description=(
                "A tiny model of 64 x 64 pixel figures that comes with the pack, so that "
                "retrieval can be tried with no download. Prompts are tags: a pose, an "
                "expression and a background."
            ),
            search_aliases=["demo", "example model", "no download"],
            inputs=[
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=LARGEST_BATCH,
                    tooltip="How many pictures the empty latent is for.",
                ),
                io.Int.Input(
                    "figures",
                    default=1,
                    min=1,
                    max=MOST_FIGURES,
                    optional=True,
                    tooltip="How many figures the pictures are wide: 2 makes room for two "
                    "characters, each with a region of its own.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
                io.Latent.Output(display_name="latent"),
            ],
        )

    @classmethod
    def execute(cls, batch_size: int, figures: int = 1) -> io.NodeOutput:
        from .host.paperdoll_host import load_demo

        return io.NodeOutput(*load_demo(batch_size, figures))
