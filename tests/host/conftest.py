"""Puts ComfyUI on the path, and the pack into it as the host would (any folder name).

It runs on the CPU; with RETRIEVAL_ON_GPU=1 on the GPU, with dynamic VRAM where the host has it.

This folder is only collected where a host was found (see tests/conftest.py).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

# Layers start without weights, as with dynamic VRAM, the newer host's default on NVIDIA cards.
LAZY_LAYERS = bool(os.environ.get("RETRIEVAL_LAZY_LAYERS"))
ON_GPU = bool(os.environ.get("RETRIEVAL_ON_GPU"))
PACK = Path(__file__).resolve().parents[2]
NAME = "retrieval_pack"
# Of the pack's extra packages for data sets, those that this Python lacks.
LACKING = [
    package
    for package in ("daft", "pyarrow", "imagehash", "sklearn", "orjson")
    if importlib.util.find_spec(package) is None
]


def _find_comfyui() -> Path:
    spec = importlib.util.spec_from_file_location(
        "retrieval_tests_root", PACK / "tests/conftest.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.find_comfyui()


def _start_host() -> None:
    sys.path.insert(0, str(_find_comfyui()))
    from comfy.cli_args import args

    args.cpu = not ON_GPU
    if ON_GPU:
        from tests.helpers.dynamic_vram import enable_dynamic_vram

        enable_dynamic_vram()
    if LAZY_LAYERS:
        import comfy.memory_management

        comfy.memory_management.aimdo_enabled = True
    # ComfyUI has a top-level module `nodes`; the pack's is only ever imported inside the pack.
    spec = importlib.util.spec_from_file_location(
        NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])


_start_host()


def pytest_terminal_summary(terminalreporter) -> None:
    if LACKING:
        terminalreporter.write_line(
            f"Host tests of building data sets skipped: {sys.executable} lacks "
            f"{', '.join(LACKING)}; to run them, install the pack's extra [data]."
        )


@pytest.fixture(autouse=True)
def inference():
    """Nodes run in inference mode; nothing encoded stays for the next test."""
    import torch
    from retrieval_pack.nodes.host.encoded_references import cache

    cache.clear()
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running server, one for all tests."""
    from serving import running

    with running(_find_comfyui(), tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="session")
def node_info(server):
    """What the server tells its frontend of every node."""
    return server.json("/object_info")
