"""Load Retrieval ControlNet: a trained network, or the training-free mode."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..retrieval_core.errors import RetrievalError
from ..retrieval_core.training_free.attention_layers import LAYER_CHOICES
from ..retrieval_core.training_free.training_free_network import LAYERS, LEVELS, MOST_LEVELS
from .host import folders
from .host.base_model import detect_base
from .host.loading import make_progress
from .socket_types import ADVANCED, CATEGORY, RetrievalControlNetType, find_refusal, make_schema

TRAINING_FREE = "training-free (no file)"
FILE = "file"
HUB = "Hugging Face hub"
DEMO = "paper-doll demo (bundled)"
NETWORKS = (TRAINING_FREE, FILE, HUB, DEMO)


class RetrievalControlNetLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalControlNetLoader",
            display_name="Load Retrieval ControlNet",
            category=CATEGORY,
            description=(
                "Loads a retrieval network: it reads reference images once and lets the model "
                "look at them while it draws."
            ),
            search_aliases=[
                "ipadapter",
                "ip-adapter plus",
                "reference only",
                "consistent character",
                "faceid",
                "controlnet reference",
                "retribooru",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The base model that the network is for."),
                io.DynamicCombo.Input(
                    "network",
                    options=[
                        io.DynamicCombo.Option(TRAINING_FREE, list_training_free_inputs()),
                        io.DynamicCombo.Option(FILE, [make_file_input()]),
                        io.DynamicCombo.Option(HUB, list_hub_inputs()),
                        io.DynamicCombo.Option(DEMO, []),
                    ],
                    tooltip="Training-free needs no file: the model itself reads the images. A "
                    f"file of models/{folders.NETWORKS}, or one of a Hugging Face repository, is a "
                    "trained network. The demo comes with the pack, for the paper-doll demo model.",
                ),
            ],
            outputs=[RetrievalControlNetType.Output(display_name="retrieval_controlnet")],
        )

    @classmethod
    def validate_inputs(cls, network: dict[str, Any] | None = None, **_: Any) -> bool | str:
        """Refuses before queueing what `execute` could not load."""
        return find_refusal(lambda: check_choice(network))

    @classmethod
    def fingerprint_inputs(cls, network: dict[str, Any] | None = None, **_: Any) -> Any:
        """Changes when the file does, so that a replaced file is read again."""
        if network is None or network["network"] != FILE:
            return ""
        return folders.describe_file(folders.NETWORKS, network["file"])

    @classmethod
    def execute(cls, model: Any, network: dict[str, Any]) -> io.NodeOutput:
        from .host.trained_network import load_network

        detect_base(model)  # before anything is downloaded
        chosen = network["network"]
        if chosen == TRAINING_FREE:
            from .host.training_free_model import use_training_free

            return io.NodeOutput(
                use_training_free(
                    model, network["layers"], network["noise_levels"], network["match_statistics"]
                )
            )
        if chosen == HUB:
            from ..retrieval_core.hub import download

            path = download(
                network["repository"].strip(),
                network["repository_file"].strip(),
                (network["revision"] or "").strip() or None,
                folders.first_path(folders.NETWORKS),
                make_progress(),
            )
        elif chosen == DEMO:
            from .host.paperdoll_host import find_demo_network

            path = find_demo_network()
        else:
            path = folders.find_file(folders.NETWORKS, network["file"])
        return io.NodeOutput(load_network(path, model))


def list_training_free_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "layers",
            options=list(LAYER_CHOICES),
            default=LAYERS,
            tooltip="The self-attention layers that look at the references while the model draws. "
            "Fewer cost less time and memory. With none, only each step's prediction is moved "
            "towards the references at corresponding places.",
        ),
        io.Int.Input(
            "noise_levels",
            default=LEVELS,
            min=1,
            max=MOST_LEVELS,
            tooltip="How many noise levels each reference is read at; each step uses the nearest. "
            "Memory and encoding time grow with it, and on the demo model 1 did best.",
        ),
        io.Boolean.Input(
            "match_statistics",
            default=False,
            tooltip="Match the statistics of the picture's features to the references' (AdaIN), "
            "which carries over style and palette.",
        ),
    ]


def make_file_input() -> io.Input:
    return io.Combo.Input(
        "file",
        options=folders.list_files(folders.NETWORKS),
        tooltip=f"A file of models/{folders.NETWORKS}.",
    )


def list_hub_inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "repository",
            default="",
            tooltip="Hugging Face repository to take the file from, as owner/name; it is "
            f"downloaded to models/{folders.NETWORKS} once.",
        ),
        io.String.Input(
            "repository_file",
            default="",
            tooltip="Name of the .safetensors file in the repository.",
        ),
        io.String.Input(
            "revision",
            default="",
            optional=True,
            tooltip="Branch, tag or commit of the repository; empty for the newest. A commit "
            "always gives the same file.",
            extra_dict=ADVANCED,
        ),
    ]


def check_choice(network: dict[str, Any] | None) -> None:
    """Raises RetrievalError if a choice of network is incomplete.

    Args:
        network: the choice and its fields; None where the host knows no such choice. A field whose
            value is linked is None, and so is a file that the page could not offer.
    """
    if network is None:
        names = ", ".join(f"'{name}'" for name in NETWORKS)
        raise RetrievalError(
            f"The choice of network is none of {names}; choose one of them, for a file of "
            f"models/{folders.NETWORKS} '{FILE}'."
        )
    if network["network"] == FILE:
        # None may be a link, which nothing fits either if there are no files.
        if network["file"] is not None or not folders.list_files(folders.NETWORKS):
            folders.find_file(folders.NETWORKS, network["file"])
    for field in ("repository", "repository_file"):
        if network["network"] == HUB and network[field] is not None and not network[field].strip():
            raise RetrievalError(
                f"'{field}' is empty, and '{HUB}' needs a repository, as owner/name, and the name "
                "of a .safetensors file in it; fill it in, or choose another network."
            )
