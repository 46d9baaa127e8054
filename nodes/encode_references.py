"""Encode References: each image of a batch becomes one encoded reference."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .socket_types import (
    ADVANCED,
    CATEGORY,
    CONCEPTS,
    ReferencesType,
    RetrievalControlNetType,
    make_factor_input,
    make_schema,
)

TAGS = "tags"
SUBJECT, BACKGROUND = "subject", "background"
AUTOMATIC, OFF = "automatic", "off"


class RetrievalEncodeReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalEncodeReferences",
            display_name="Encode References",
            category=CATEGORY,
            description=(
                "Encodes reference images for retrieval. Chain several of these to combine, say, "
                "a face and an outfit."
            ),
            search_aliases=[
                "ipadapter",
                "reference only",
                "reference image",
                "consistent character",
                "faceid",
                "face reference",
                "clothes reference",
                "outfit",
            ],
            inputs=[
                RetrievalControlNetType.Input(
                    "retrieval_controlnet", tooltip="The network that is to read the images."
                ),
                io.Image.Input(
                    "images",
                    tooltip="Reference images; each image of the batch is one reference. They are "
                    "padded to squares, never squashed.",
                ),
                io.Vae.Input("vae", tooltip="The base model's VAE."),
                io.Clip.Input("clip", tooltip="The base model's CLIP."),
                io.DynamicCombo.Input(
                    "concept",
                    options=[
                        *(io.DynamicCombo.Option(name, []) for name in CONCEPTS),
                        io.DynamicCombo.Option(TAGS, [make_tags_input()]),
                    ],
                    tooltip="What to take from the images: the whole figure, the face, the "
                    "clothes, or what tags of your own say.",
                ),
                make_factor_input(
                    "weight",
                    "How much these references count beside the others; 0 leaves them out.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    optional=True,
                    tooltip="Edge in pixels that references are scaled to: smaller is faster, "
                    "larger keeps detail. 0 is the base model's own size.",
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "mask_marks",
                    options=[SUBJECT, BACKGROUND],
                    default=SUBJECT,
                    optional=True,
                    tooltip="What is white in the mask. Masks of segmentation nodes mark the "
                    "subject; Load Image's mask marks what is transparent or was painted, which "
                    "is the background of a cut-out picture.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Keeps to the subject: one mask for all images or one each. What is "
                    "outside is never encoded, so it cannot leak. The black mask of 64 x 64 that "
                    "Load Image gives for an opaque picture counts as no mask. The preview shows "
                    "what was encoded.",
                ),
                ReferencesType.Input(
                    "references",
                    optional=True,
                    tooltip="References to add these to, encoded by the same network.",
                ),
                io.Combo.Input(
                    "subject_mask",
                    options=[AUTOMATIC, OFF],
                    default=AUTOMATIC,
                    optional=True,
                    tooltip="Training-free, and without a mask: the base model itself tells the "
                    "subject from the background, which is left out. A trained network leaves it "
                    "out by itself.",
                ),
            ],
            outputs=[
                ReferencesType.Output(display_name="references"),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="What was taken of each image, white, by the mask given or found.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, images: Any, concept: dict[str, Any] | None = None) -> bool | str:
        """Refuses before queueing a concept that the host does not know (`images` is linked)."""
        if concept is not None:
            return True
        names = ", ".join(f"'{name}'" for name in CONCEPTS)
        return (
            f"The concept is none of {names} and '{TAGS}'; choose one of them, for words of your "
            f"own '{TAGS}'."
        )

    @classmethod
    def execute(
        cls,
        retrieval_controlnet: Any,
        images: Any,
        vae: Any,
        clip: Any,
        concept: dict[str, Any],
        weight: float,
        size: int = 0,
        mask_marks: str = SUBJECT,
        mask: Any = None,
        references: Any = None,
        subject_mask: str = AUTOMATIC,
    ) -> io.NodeOutput:
        from .host import encoded_references as host
        from .host.page_display import show_references

        network, words = retrieval_controlnet, concept["concept"]
        if words == TAGS:
            words = concept["tags"]
        earlier = host.list_earlier(references, network)
        encoded = host.encode_references(
            network,
            images,
            vae,
            clip,
            words,
            weight,
            mask,
            size,
            mask_marks,
            subject_mask == AUTOMATIC,
        )
        return io.NodeOutput(
            host.References(network, (*earlier, *encoded)),
            host.draw_masks(encoded, *images.shape[1:3]),
            ui=show_references(encoded, network, cls),
        )


def make_tags_input() -> io.Input:
    return io.String.Input(
        "tags",
        default="",
        tooltip="What to take from the images, as the base model's prompts say it, for example "
        "long red hair.",
    )
