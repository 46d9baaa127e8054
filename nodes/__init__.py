"""The pack's ComfyUI nodes; imported by the host only."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .host import environment as host

# At import: the host never calls an extension's on_load in 0.8.0.
host.register_folder()
host.register_folder(host.REFERENCES_FOLDER)


class RetrievalExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .apply_reference_retrieval import RetrievalApplyReferences
        from .encode_references import RetrievalEncodeReferences
        from .load_references import RetrievalLoadReferences
        from .load_retrieval_controlnet import RetrievalLoadControlNet
        from .paperdoll_nodes import RetrievalPaperdollModel, RetrievalPaperdollReference
        from .retrieval_controls import RetrievalControls
        from .retrieval_map import RetrievalMap, RetrievalRecordMap
        from .save_references import RetrievalSaveReferences
        from .score_nodes import (
            RetrievalImageSimilarity,
            RetrievalPaperdollMatch,
            RetrievalTextSimilarity,
        )
        from .vqa_diversity_score import RetrievalVQADiversityScore

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
