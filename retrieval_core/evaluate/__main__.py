"""`python -m retrieval_core.evaluate`: the protocol of §5.3 on a folder of characters.

Every `--workflow NAME=FILE.json` is a method: a ComfyUI workflow in the API form, run by
`--server` over its strength, where 0 is no retrieval.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import RetrievalError, run_command
from ..metrics.encoders import load_clip, load_dino
from ..metrics.model_folder import find_model
from ..metrics.pretrained import choose_device
from ..metrics.vqa_models import load_vqa
from .characters import read_characters
from .command import add_arguments, evaluate, make_workflow_methods, read_protocol
from .protocol import RETRIBOORU
from .scores import ModelScorer

PRESETS = {"retribooru": RETRIBOORU}


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m retrieval_core.evaluate",
        description=(__doc__ or "").split(": ", 1)[1].splitlines()[0],
    )
    parser.add_argument(
        "--characters", type=Path, metavar="FOLDER", required=True,
        help="in_domain/NAME/*.png and held_out/NAME/*.png",
    )  # fmt: skip
    add_arguments(parser, PRESETS)
    scores = parser.add_argument_group("scores (a name on the hub, or a folder)")
    scores.add_argument("--clip", help="CLIP for CLIP-I and CLIP-T")
    scores.add_argument("--dino", help="DINO for DINO-I")
    scores.add_argument("--vqa", help="VQA model for the diversity score")
    return parser.parse_args(given)


def load_scorer(options: argparse.Namespace) -> ModelScorer:
    """The models that the command line names, on the GPU if there is one."""
    if not options.clip:
        raise RetrievalError(
            "A folder of characters is scored by CLIP; name one with --clip, such as "
            "openai/clip-vit-large-patch14 or a folder."
        )
    device = choose_device()
    clip = load_clip(find_model(options.clip), device)
    dino = load_dino(find_model(options.dino), device) if options.dino else None
    vqa = None
    if options.vqa:
        vqa = load_vqa(find_model(options.vqa), device=device)
    names = [n for n in (options.clip, options.dino, options.vqa) if n]
    return ModelScorer(clip, dino, vqa, names)


def main(given: Sequence[str] | None = None) -> int:
    options = parse(given)

    def work() -> None:
        protocol = read_protocol(options, PRESETS)
        methods = [] if options.report else make_workflow_methods(options)
        characters = read_characters(options.characters, protocol)
        evaluate(options, protocol, methods, characters, load_scorer(options))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
