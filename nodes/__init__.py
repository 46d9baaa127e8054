"""The pack's ComfyUI nodes; imported by the host only."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import host

# At import: the host never calls an extension's on_load in 0.8.0.
host.register_folder()


class RetrievalExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .apply import RetrievalApplyReferences
        from .encode import RetrievalEncodeReferences
        from .load import RetrievalLoadControlNet
        from .paperdoll import RetrievalPaperdollModel, RetrievalPaperdollReference

        return [
            RetrievalLoadControlNet,
            RetrievalEncodeReferences,
            RetrievalApplyReferences,
            RetrievalPaperdollModel,
            RetrievalPaperdollReference,
        ]


async def comfy_entrypoint() -> ComfyExtension:
    """Called once by the host when it loads the pack."""
    return RetrievalExtension()
