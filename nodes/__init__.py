"""The pack's ComfyUI nodes; imported by the host only."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .host import dataset_folder, folders

# At import: 0.8.0 never calls an extension's on_load.
folders.register_folder(folders.NETWORKS)
folders.register_folder(folders.REFERENCES)
dataset_folder.register()


class RetrievalExtension(ComfyExtension):
    """All nodes of the pack."""

    async def on_load(self) -> None:
        """Called by hosts that can replace nodes; 0.8.0 cannot, and never calls it."""
        from .replaced_nodes import register_replacements

        await register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .apply_reference_retrieval import RetrievalApplyReferences
        from .build_retrieval_dataset import RetrievalBuildDataset
        from .consistent_pictures import RetrievalConsistentPictures
        from .encode_references import RetrievalEncodeReferences
        from .image_similarity import RetrievalImageSimilarity
        from .load_paperdoll_demo import RetrievalPaperdollModel
        from .load_references import RetrievalLoadReferences
        from .load_retrieval_controlnet import RetrievalControlNetLoader
        from .paperdoll_match import RetrievalPaperdollMatch
        from .paperdoll_reference import RetrievalPaperdollReference
        from .preview_retrieval_dataset import RetrievalPreviewDataset
        from .record_retrieval_map import RetrievalRecordMap
        from .retrieval_controls import RetrievalControls
        from .retrieval_map import RetrievalMap
        from .save_references import RetrievalSaveReferences
        from .text_similarity import RetrievalTextSimilarity
        from .train_retrieval_controlnet import RetrievalTrainControlNet
        from .vqa_diversity_score import RetrievalVQADiversityScore

        return [
            RetrievalControlNetLoader,
            RetrievalEncodeReferences,
            RetrievalApplyReferences,
            RetrievalControls,
            RetrievalConsistentPictures,
            RetrievalSaveReferences,
            RetrievalLoadReferences,
            RetrievalRecordMap,
            RetrievalMap,
            RetrievalBuildDataset,
            RetrievalPreviewDataset,
            RetrievalTrainControlNet,
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
