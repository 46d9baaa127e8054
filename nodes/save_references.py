"""Save References: a character as one file."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .host import folders
from .socket_types import CATEGORY, ReferencesType, make_schema


class RetrievalSaveReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalSaveReferences",
            display_name="Save References",
            category=CATEGORY,
            description=(
                f"Saves encoded references as one file in models/{folders.REFERENCES}, with "
                "their pictures, weights and concepts, for Load References. It never overwrites."
            ),
            search_aliases=["save character", "save ipadapter embeds", "embeds"],
            inputs=[
                ReferencesType.Input("references", tooltip="From Encode References."),
                io.String.Input(
                    "name",
                    default="character",
                    tooltip="Name of the file, to which a number is added; folder/name makes a "
                    "subfolder.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, references: Any, name: str) -> io.NodeOutput:
        from .host.encoded_references import draw_references
        from .host.reference_library import save

        path = save(references, name)
        shown = draw_references(references.encoded)
        if shown is None:
            return io.NodeOutput(ui=ui.PreviewText(path.name))
        return io.NodeOutput(ui=ui.PreviewImage(shown, cls=cls))
