"""Shared parts of the evaluation's commands: arguments, workflows as methods, reports."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..errors import RetrievalError
from . import summary
from .characters import Character
from .comfy import SERVER, Client, ComfyMethod
from .evaluation import Evaluation
from .methods import Method
from .protocol import Protocol
from .scores import Scorer
from .workflow import load_workflow, parse_bindings

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)
# --quick: 4 characters, 2 seeds, 2 samples: 80 pictures a weight.
QUICK = {"in_domain": 2, "held_out": 2, "seeds": 2, "samples": 2}

Prompts = Mapping[str, tuple[str, ...]]


def add_arguments(parser: argparse.ArgumentParser, presets: Prompts) -> None:
    """Adds the arguments of every evaluation; presets: name -> prompts."""
    paper = Protocol()
    out = parser.add_argument_group("where")
    out.add_argument("--out", type=Path, default=Path("output/evaluation"))
    out.add_argument("--json", action="store_true", help="the means as one JSON object")
    out.add_argument("--report", action="store_true", help="only writes the reports again")
    numbers = parser.add_argument_group("protocol (defaults: §5.3)")
    numbers.add_argument("--quick", action="store_true", help=f"{QUICK}")
    numbers.add_argument("--in-domain", type=int, help=f"characters ({paper.in_domain})")
    numbers.add_argument("--held-out", type=int, help=f"characters ({paper.held_out})")
    numbers.add_argument("--references", type=int, default=paper.references)
    numbers.add_argument("--seeds", type=int, help=f"runs of a prompt ({paper.seeds})")
    numbers.add_argument("--samples", type=int, help=f"pictures a run ({paper.samples})")
    numbers.add_argument("--seed", type=int, default=paper.seed, help="another, others")
    numbers.add_argument(
        "--prompts",
        default=next(iter(presets)),
        help=f"{', '.join(presets)}, or a text file with one prompt a line",
    )
    methods = parser.add_argument_group("methods")
    methods.add_argument("--strengths", type=float, nargs="+", default=list(STRENGTHS))
    methods.add_argument("--workflow", action="append", default=[], metavar="NAME=FILE.json")
    methods.add_argument(
        "--bind", action="append", default=[], metavar="[NAME:]ROLE=NODE.INPUT",
        help="where a workflow takes prompt, seed, strength, samples, reference1...; NODE is an id "
        "or a title; without it, titles say {prompt}, {seed}, ...",
    )  # fmt: skip
    methods.add_argument("--server", default=SERVER, help="of the running ComfyUI")
    methods.add_argument("--timeout", type=float, default=600.0, help="seconds a workflow may take")


def read_protocol(options: argparse.Namespace, presets: Prompts, masked: bool = False) -> Protocol:
    """The protocol of the command line."""
    paper = Protocol()
    counts = {}
    for name in ("in_domain", "held_out", "seeds", "samples"):
        asked = getattr(options, name)
        default = QUICK[name] if options.quick else getattr(paper, name)
        counts[name] = default if asked is None else asked
    return Protocol(
        **counts,
        references=options.references,
        prompts=_read_prompts(options.prompts, presets),
        seed=options.seed,
        masked=masked,
    )


def _read_prompts(named: str, presets: Prompts) -> tuple[str, ...]:
    if named in presets:
        return presets[named]
    try:
        lines = Path(named).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RetrievalError(
            f"The prompts '{named}' are neither a preset ({', '.join(presets)}) nor a text file "
            f"that can be read ({error})."
        ) from error
    return tuple(line.strip() for line in lines if line.strip())


def make_workflow_methods(options: argparse.Namespace) -> list[Method]:
    """A method for each `--workflow`."""
    wrong = [s for s in options.strengths if not 0 <= s < float("inf")]
    if wrong:
        raise RetrievalError(f"The strength {wrong[0]} is not a number of 0 or more.")
    named: dict[str, str] = {}
    for text in options.workflow:
        name, _, path = text.partition("=")
        if not (name and path) or name in named:
            raise RetrievalError(
                f"The workflow '{text}' is not of the form NAME=FILE.json with a name of its own."
            )
        named[name] = path
    methods: list[Method] = []
    for name, path in named.items():
        others = tuple(f"{other}:" for other in named if other != name)
        own = [t.removeprefix(f"{name}:") for t in options.bind if not t.startswith(others)]
        workflow = load_workflow(Path(path), parse_bindings(own))
        client = Client(options.server, options.timeout)
        methods.append(ComfyMethod(name, workflow, client, options.strengths))
    return methods


def evaluate(
    options: argparse.Namespace,
    protocol: Protocol,
    methods: Sequence[Method],
    characters: Sequence[Character],
    scorer: Scorer,
) -> None:
    """Runs the methods, writes the reports and prints their paths.

    Raises:
        RetrievalError: no method, or two of one name; see `Evaluation`.
    """
    if not methods and not options.report:
        raise RetrievalError("There is no method to evaluate; name a --workflow NAME=FILE.json.")
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise RetrievalError(f"Two methods are called '{name}'; give one another name.")
    started = time.perf_counter()
    evaluation = Evaluation(options.out, protocol, characters, scorer)
    with torch.inference_mode():
        for method in methods:
            for weight in method.weights:
                evaluation.run(method, weight)
    paths = evaluation.report()
    lines = summary.summarise(evaluation.ledger.rows, evaluation.scorer)
    if options.json:
        print(json.dumps({"protocol": asdict(protocol), "lines": summary.list_means(lines)}))
        return
    print(paths[1].read_text(encoding="utf-8"))
    for path in paths:
        print(f"Wrote {path.resolve()}")
    print(f"It took {time.perf_counter() - started:.0f} s.")
