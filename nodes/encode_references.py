"""Encode References: each image of a batch becomes one encoded reference."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .socket_types import CATEGORY, ReferencesType, RetrievalControlNetType, make_factor_input

SUBJECT, BACKGROUND = "subject", "background"


class RetrievalEncodeReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RetrievalEncodeReferences",
            display_name="Encode References",
            category=CATEGORY,
            description=(
                "Encodes reference images for retrieval. Chain several of these to combine, say, "
                "a face and an outfit."
            ),
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
                io.String.Input(
                    "concept",
                    default="figure",
                    tooltip="What to take from the images: face, clothes, figure, or tags.",
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
            ],
            outputs=[ReferencesType.Output(display_name="references")],
        )

    @classmethod
    def execute(
        cls,
        retrieval_controlnet: Any,
        images: Any,
        vae: Any,
        clip: Any,
        concept: str,
        weight: float,
        size: int = 0,
        mask_marks: str = SUBJECT,
        mask: Any = None,
        references: Any = None,
    ) -> io.NodeOutput:
        from .host import encoded_references as host

        network = retrieval_controlnet
        earlier = host.list_earlier(references, network)
        encoded = host.encode_references(
            network, images, vae, clip, concept, weight, mask, size, mask_marks
        )
        shown = ui.PreviewImage(host.draw_references(encoded), cls=cls)
        return io.NodeOutput(host.References(network, (*earlier, *encoded)), ui=shown)
