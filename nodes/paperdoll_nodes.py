"""Nodes of the bundled paper-doll demo: its base model, and pictures of its characters."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "retrieval/demo"
CONCEPTS = ("figure", "face", "clothes")
LARGEST_BATCH = 64
MOST_FIGURES = 4
MOST_PICTURES = 16


class RetrievalPaperdollModel(io.ComfyNode):
    """The bundled base model as the host's own MODEL, CLIP and VAE, and a latent of its size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RetrievalPaperdollModel",
            display_name="Load Paper-Doll Demo Model",
            category=CATEGORY,
            description=(
                "A tiny model of 64 x 64 pixel figures that comes with the pack, so that "
                "retrieval can be tried with no download. Prompts are tags: a pose, an "
                "expression and a background."
            ),
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
        from ..retrieval_core.paperdoll import bundle, model
        from .host.paperdoll_host import empty_latent, host_clip, host_model, host_vae

        base = model.load_base(bundle.bundled(bundle.BASE_FILE))
        latent = empty_latent(base, batch_size, figures)
        return io.NodeOutput(host_model(base), host_clip(base), host_vae(base), latent)


class RetrievalPaperdollReference(io.ComfyNode):
    """Reference pictures of one paper-doll character, cut to a concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RetrievalPaperdollReference",
            display_name="Paper-Doll Reference",
            category=CATEGORY,
            description=(
                "Draws a character that the demo's networks never saw in training, in varied "
                "poses and places, as references for the demo."
            ),
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
        from .host.paperdoll_host import reference_pictures

        return io.NodeOutput(*reference_pictures(character, concept, pictures))
