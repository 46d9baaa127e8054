"""Load References: a character from its file."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .host import folders
from .socket_types import (
    CATEGORY,
    ReferencesType,
    RetrievalControlNetType,
    make_factor_input,
    make_schema,
)


class RetrievalLoadReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalLoadReferences",
            display_name="Load References",
            category=CATEGORY,
            description=(
                "Loads references that Save References wrote. They sample exactly as the saved "
                "ones did, and need neither the images nor VAE and CLIP."
            ),
            search_aliases=[
                "load character",
                "load ipadapter embeds",
                "embeds",
                "consistent character",
            ],
            inputs=[
                RetrievalControlNetType.Input(
                    "retrieval_controlnet",
                    tooltip="The network that encoded the references; another's are refused.",
                ),
                io.Combo.Input(
                    "file",
                    options=folders.list_files(folders.REFERENCES),
                    tooltip=f"A file of models/{folders.REFERENCES}.",
                ),
                make_factor_input(
                    "weight",
                    "Multiplies the saved weights: how much these references count beside others.",
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
    def fingerprint_inputs(cls, file: str = "", **_: Any) -> Any:
        """Changes when the file does, so that a replaced file is read again."""
        return folders.describe_file(folders.REFERENCES, file)

    @classmethod
    def execute(
        cls, retrieval_controlnet: Any, file: str, weight: float, references: Any = None
    ) -> io.NodeOutput:
        from .host.encoded_references import References, list_earlier
        from .host.page_display import show_references
        from .host.reference_library import load

        earlier = list_earlier(references, retrieval_controlnet)
        loaded = load(file, retrieval_controlnet, weight)
        shown = show_references(loaded, retrieval_controlnet, cls)
        return io.NodeOutput(References(retrieval_controlnet, (*earlier, *loaded)), ui=shown)
