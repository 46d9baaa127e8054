"""Encode References."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .socket_types import CATEGORY, ReferencesType, RetrievalControlNetType


class RetrievalEncodeReferences(io.ComfyNode):
    """Each image of the batch becomes one reference, encoded once."""

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
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much these references count beside the others; 0 leaves them out.",
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
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the subject is, one mask for all images or one each. What "
                    "is outside is never encoded, so it cannot leak.",
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
        mask: Any = None,
        references: Any = None,
    ) -> io.NodeOutput:
        from .host.encoded_references import References, encode_references

        network = retrieval_controlnet
        before = ()
        if references is not None:
            references.check_network(network)
            before = references.encoded
        encoded = encode_references(network, images, vae, clip, concept, weight, mask, size)
        return io.NodeOutput(References(network, (*before, *encoded)))
