"""The weights that come with the pack (see train.py for the command that reproduces them)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import RetrievalError
from ..network.controlnet import RetrievalControlNet, load
from .judge import Judge, load_judge
from .model import PaperdollModel, load_base

FOLDER = Path(__file__).parent / "weights"
BASE_FILE = "paperdoll_base.safetensors"
RETRIEVAL_FILE = "paperdoll_retrieval.safetensors"
JUDGE_FILE = "paperdoll_judge.safetensors"


@dataclass(frozen=True)
class Bundle:
    """Base model, retrieval network and judge, in float32 on the CPU, ready for inference."""

    base: PaperdollModel
    network: RetrievalControlNet
    judge: Judge


def find_bundled(name: str, folder: Path | None = None) -> Path:
    """The path of a bundled file; RetrievalError if the installation lacks it."""
    path = (folder or FOLDER) / name
    if not path.is_file():
        raise RetrievalError(
            f"The weights '{path}' are missing; install the pack again, or train them with "
            "'python run.py train' of its repository."
        )
    return path


def load_bundle(folder: Path | None = None) -> Bundle:
    """All three models from `folder` (default: those that come with the pack)."""
    network = load(find_bundled(RETRIEVAL_FILE, folder), "paperdoll", dtype=torch.float32)
    return Bundle(
        load_base(find_bundled(BASE_FILE, folder)),
        network.eval().requires_grad_(False),
        load_judge(find_bundled(JUDGE_FILE, folder)),
    )
