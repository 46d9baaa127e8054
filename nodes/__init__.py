"""The pack's ComfyUI nodes; imported by the host only."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import host

# At import: the host never calls an extension's on_load in 0.8.0.
host.register_folder()
host.register_folder(host.REFERENCES_FOLDER)


class RetrievalExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .apply import RetrievalApplyReferences
        from .controls import RetrievalControls
        from .encode import RetrievalEncodeReferences
        from .load import RetrievalLoadControlNet
        from .load_references import RetrievalLoadReferences
        from .paperdoll import RetrievalPaperdollModel, RetrievalPaperdollReference
        from .retrieval_map import RetrievalMap, RetrievalRecordMap
        from .save_references import RetrievalSaveReferences
        from .scores import (
            RetrievalImageSimilarity,
            RetrievalPaperdollMatch,
            RetrievalTextSimilarity,
        )
        from .vqa import RetrievalVQADiversityScore

        return [
            RetrievalLoadControlNet,
            RetrievalEncodeReferences,
            RetrievalApplyReferences,
            RetrievalControls,
            RetrievalSaveReferences,
            RetrievalLoadReferences,
            RetrievalRecordMap,
            RetrievalMap,
            RetrievalPaperdollModel,
            RetrievalPaperdollReference,
            RetrievalVQADiversityScore,
            RetrievalImageSimilarity,
            RetrievalTextSimilarity,
            RetrievalPaperdollMatch,
        ]


async def comfy_entrypoint() -> ComfyExtension:
    """Called once by the host when it loads the pack."""
    return RetrievalExtension()
