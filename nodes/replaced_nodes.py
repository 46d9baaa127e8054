"""Node ids that saved workflows may carry and the pack no longer has."""

from __future__ import annotations

from comfy_api.latest import ComfyAPI, io

# Load Retrieval ControlNet until 0.1: one `file` input, and the fields of all choices beside it.
OLD_LOADER = "RetrievalLoadControlNet"
OLD_LOADER_WIDGETS = (
    "file",
    "repository",
    "repository_file",
    "revision",
    "layers",
    "noise_levels",
    "match_statistics",
)


async def register_replacements() -> None:
    """Tells the host which node takes the place of one that a saved workflow asks for.

    A file chosen by name and a repository are not replaced: the new node's `validate_inputs` says
    what to choose.
    """
    fields = [{"new_id": f"network.{old}", "old_id": old} for old in OLD_LOADER_WIDGETS[1:]]
    await ComfyAPI().node_replacement.register(
        io.NodeReplace(
            new_node_id="RetrievalControlNetLoader",
            old_node_id=OLD_LOADER,
            old_widget_ids=list(OLD_LOADER_WIDGETS),
            input_mapping=[
                {"new_id": "model", "old_id": "model"},
                {"new_id": "network", "old_id": "file"},
                *fields,
            ],
            output_mapping=[{"new_idx": 0, "old_idx": 0}],
        )
    )
