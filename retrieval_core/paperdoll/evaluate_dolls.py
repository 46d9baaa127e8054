"""`python -m retrieval_core.paperdoll.evaluate_dolls`: the protocol of §5.3 on paper dolls.

The methods are the bundled network (`trained`, over its strength, where 0 is no retrieval), the
training-free mode, and workflows of a ComfyUI that draw paper dolls; the judge scores them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import run_command
from ..evaluate.command import add_arguments, evaluate, make_workflow_methods, read_protocol
from ..evaluate.methods import Method
from ..network.controlnet import GUIDANCES
from .bundle import JUDGE_FILE, find_bundled, load_bundle
from .doll_characters import PROMPTS, draw_characters
from .doll_methods import TrainedMethod, TrainingFreeMethod
from .doll_scorer import PaperdollScorer
from .generate import Sampling
from .judge import load_judge

PRESETS = {"paperdoll": PROMPTS}


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m retrieval_core.paperdoll.evaluate_dolls",
        description=(__doc__ or "").split(": ", 1)[1].splitlines()[0],
    )
    add_arguments(parser, PRESETS)
    parser.add_argument("--masked", action="store_true", help="references without background")
    core = parser.add_argument_group("the core's methods")
    core.add_argument("--no-core", action="store_true", help="workflows only")
    core.add_argument("--training-free", action="store_true", help="a curve of that mode, too")
    core.add_argument("--weights", type=Path, help="folder of paper-doll weights")
    core.add_argument("--name", default="trained", help="of the network's curve")
    core.add_argument("--steps", type=int, default=Sampling.steps)
    core.add_argument("--cfg", type=float, default=Sampling.cfg)
    core.add_argument("--guidance", choices=GUIDANCES)
    return parser.parse_args(given)


def make_methods(options: argparse.Namespace) -> list[Method]:
    """The core's methods and every workflow's."""
    workflows = make_workflow_methods(options)
    if options.no_core:
        return workflows
    how = Sampling(options.steps, options.cfg, guidance=options.guidance)
    bundle = load_bundle(options.weights)
    methods: list[Method] = [TrainedMethod(bundle, options.strengths, how, options.name)]
    if options.training_free:
        methods.append(TrainingFreeMethod(bundle.base, options.strengths, how))
    return [*methods, *workflows]


def main(given: Sequence[str] | None = None) -> int:
    options = parse(given)

    def work() -> None:
        protocol = read_protocol(options, PRESETS, options.masked)
        methods = [] if options.report else make_methods(options)
        scorer = PaperdollScorer(load_judge(find_bundled(JUDGE_FILE, options.weights)))
        evaluate(options, protocol, methods, draw_characters(protocol), scorer)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
