"""A paper-doll base and judge of random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from retrieval_core.paperdoll.bundle import BASE_FILE, JUDGE_FILE
from retrieval_core.paperdoll.judge import Judge
from retrieval_core.paperdoll.model import PaperdollModel


def save_untrained(folder: Path) -> Path:
    """Writes both files into a folder, and returns it."""
    torch.manual_seed(0)
    made = PaperdollModel()
    basis = made.vae.basis  # zero until it is fitted to pictures
    basis.copy_(torch.linalg.qr(torch.randn(basis.shape[1], basis.shape[0])).Q.T)
    made.save(folder / BASE_FILE)
    Judge().save(folder / JUDGE_FILE)
    return folder
