"""`python -m retrieval_core.training run.toml`: trains a Retrieval ControlNet.

On several cards: `accelerate launch -m retrieval_core.training run.toml`. The same command again
goes on with a run that was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..errors import run_command
from .base_checkpoint import load_base
from .run_config import read_config
from .training_run import train


def main(given: Sequence[str] | None = None) -> int:
    """Returns the exit code: 130 of an interrupted run."""

    def work() -> int:
        config = read_config(given)
        return 130 if train(config, load_base(config)) is None else 0

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
