"""Load Retrieval ControlNet."""

from __future__ import annotations

import os
from typing import Any

from comfy_api.latest import io

from . import host
from .types import CATEGORY, RetrievalControlNetType

DEMO = "paper-doll demo (bundled)"


class RetrievalLoadControlNet(io.ComfyNode):
    """A trained network from the models folder, the hub, or the bundled demo."""

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
                    options=[DEMO, *host.network_files()],
                    default=DEMO,
                    tooltip=f"A file of models/{host.FOLDER}, or the demo that comes with the "
                    "pack (for the paper-doll demo model). Not used if a repository is given.",
                ),
                io.String.Input(
                    "repository",
                    default="",
                    optional=True,
                    tooltip="Hugging Face repository to take the file from, as owner/name; it is "
                    f"downloaded to models/{host.FOLDER} once. Leave empty for the file above.",
                ),
                io.String.Input(
                    "repository_file",
                    default="",
                    optional=True,
                    tooltip="Name of the .safetensors file in the repository.",
                ),
                io.String.Input(
                    "revision",
                    default="",
                    optional=True,
                    tooltip="Branch, tag or commit of the repository; empty for the newest. A "
                    "commit always gives the same file.",
                ),
            ],
            outputs=[RetrievalControlNetType.Output(display_name="retrieval_controlnet")],
        )

    @classmethod
    def fingerprint_inputs(
        cls, file: str = DEMO, repository: str = "", revision: str = "", **_: Any
    ) -> Any:
        """Changes when the file does, so that a replaced file is read again."""
        if repository.strip() or file == DEMO:
            return ""
        try:
            status = os.stat(host.network_path(file))
        except (ValueError, OSError):
            return "missing"
        return f"{status.st_mtime_ns} {status.st_size}"

    @classmethod
    def execute(
        cls,
        model: Any,
        file: str,
        repository: str = "",
        repository_file: str = "",
        revision: str = "",
    ) -> io.NodeOutput:
        from .network import load_network

        host.detect_base(model)  # before anything is downloaded
        if repository.strip():
            path = _downloaded(repository, repository_file, revision)
        elif file == DEMO:
            from ..retrieval_core.paperdoll import bundle

            path = bundle.bundled(bundle.RETRIEVAL_FILE)
        else:
            path = host.network_path(file)
        return io.NodeOutput(load_network(path, model))


def _downloaded(repository: str, file: str, revision: str) -> Any:
    from .hub import download

    return download(
        repository.strip(),
        file.strip(),
        revision.strip() or None,
        host.download_folder(),
        host.transfer_progress(),
    )
