"""Load Retrieval ControlNet: a trained network, or the training-free mode."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..retrieval_core.training_free.attention_layers import LAYER_CHOICES
from ..retrieval_core.training_free.training_free_network import LAYERS, LEVELS, MOST_LEVELS
from .host import folders
from .host.base_model import detect_base
from .host.loading import make_progress
from .socket_types import CATEGORY, RetrievalControlNetType, make_name_input

DEMO = "paper-doll demo (bundled)"
TRAINING_FREE = "training-free (no file)"


class RetrievalLoadControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RetrievalLoadControlNet",
            display_name="Load Retrieval ControlNet",
            category=CATEGORY,
            description=(
                "Loads a retrieval network: it reads reference images once and lets the model "
                "look at them while it draws."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The base model that the network is for."),
                io.Combo.Input(
                    "file",
                    options=[DEMO, TRAINING_FREE, *folders.list_files(folders.NETWORKS)],
                    default=DEMO,
                    tooltip=f"A file of models/{folders.NETWORKS}; or the demo that comes with the "
                    "pack (for the paper-doll demo model); or training-free, which needs no file: "
                    "the model itself reads the images. Not used if a repository is given.",
                ),
                make_name_input(
                    "repository",
                    "Hugging Face repository to take the file from, as owner/name; it is "
                    f"downloaded to models/{folders.NETWORKS} once. Leave empty for the file "
                    "above.",
                ),
                make_name_input(
                    "repository_file",
                    "Name of the .safetensors file in the repository.",
                ),
                make_name_input(
                    "revision",
                    "Branch, tag or commit of the repository; empty for the newest. A "
                    "commit always gives the same file.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYER_CHOICES),
                    default=LAYERS,
                    optional=True,
                    tooltip="Training-free only: the self-attention layers that look at the "
                    "references. Fewer cost less time and memory; on the demo model the decoder's "
                    "do nearly all of it.",
                ),
                io.Int.Input(
                    "noise_levels",
                    default=LEVELS,
                    min=1,
                    max=MOST_LEVELS,
                    optional=True,
                    tooltip="Training-free only: how many noise levels each reference is read at; "
                    "each step uses the nearest. Memory and encoding time grow with it, and on the "
                    "demo model 1 did best.",
                ),
                io.Boolean.Input(
                    "match_statistics",
                    default=False,
                    optional=True,
                    tooltip="Training-free only: match the statistics of the picture's features to "
                    "the references' (AdaIN), which carries over style and palette.",
                ),
            ],
            outputs=[RetrievalControlNetType.Output(display_name="retrieval_controlnet")],
        )

    @classmethod
    def fingerprint_inputs(
        cls, file: str = DEMO, repository: str = "", revision: str = "", **_: Any
    ) -> Any:
        """Changes when the file does, so that a replaced file is read again."""
        if repository.strip() or file in (DEMO, TRAINING_FREE):
            return ""
        return folders.describe_file(folders.NETWORKS, file)

    @classmethod
    def execute(
        cls,
        model: Any,
        file: str,
        repository: str = "",
        repository_file: str = "",
        revision: str = "",
        layers: str = LAYERS,
        noise_levels: int = LEVELS,
        match_statistics: bool = False,
    ) -> io.NodeOutput:
        from .host.trained_network import load_network

        detect_base(model)  # before anything is downloaded
        if repository.strip():
            from ..retrieval_core.hub import download

            path = download(
                repository.strip(),
                repository_file.strip(),
                revision.strip() or None,
                folders.first_path(folders.NETWORKS),
                make_progress(),
            )
        elif file == TRAINING_FREE:
            from .host.training_free_model import use_training_free

            return io.NodeOutput(use_training_free(model, layers, noise_levels, match_statistics))
        elif file == DEMO:
            from .host.paperdoll_host import find_demo_network

            path = find_demo_network()
        else:
            path = folders.find_file(folders.NETWORKS, file)
        return io.NodeOutput(load_network(path, model))
