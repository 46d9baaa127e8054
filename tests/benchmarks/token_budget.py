"""Loss and cost of the automatic token budget: attribute match, step cost, making the bank.

`python -m tests.benchmarks.token_budget` with the Python of a ComfyUI; see `--help`. The match is
of paper dolls whose tokens merge at the ratios of the named base; costs are of SD 1.5's U-Net in
the host, at pictures of 512 and 1024 pixels (at the latter, SDXL's ratios).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from retrieval_core.network.unet import SD15
from retrieval_core.paperdoll.bundle import load_bundle
from retrieval_core.paperdoll.generate import Sampling
from retrieval_core.paperdoll.measure_controls import measure_budgets

from . import step_cost

# Picture size -> the row of the table whose ratios SD 1.5's U-Net merges at there.
SIZES = {512: "SD 1.5", 1024: "SDXL"}


def measure(count: int, seed: int, rounds: int) -> dict[str, Any]:
    """Matches by task and budget, and costs by picture size, as one JSON-able object."""
    with torch.inference_mode():
        match = measure_budgets(load_bundle(), count, seed, Sampling())
    costs = {}
    for size in SIZES:
        given = ["--size", str(size), "--rounds", str(rounds), "--only", "trained-4-budget-both"]
        found = step_cost.measure(step_cost.arguments([*given, "--references", "4"]), False, SD15)
        _, step = found["steps"]
        costs[size] = {"step": step, "making the bank": found["once"][1]}
    return {"figures": count, "seed": seed, "match": match, "costs": costs}


def text(result: dict[str, Any]) -> str:
    """One line for each budget."""
    match, costs = result["match"], result["costs"]
    heads = ("match", "lost", "match", "lost", "step at", "ratio", "floor", "bank", "floor")
    lines = [
        f"Attribute match of {result['figures']} figures (four references, composition), percent.",
        "A step over the base's and the bank of four over one encoder pass, each with the floor",
        "that operations set, are of SD 1.5's U-Net, which at 1024 pixels merges as SDXL does.",
        "",
        f"{'':42}" + "".join(f"{head:>9}" for head in heads),
    ]
    first, second = match.values()
    for name in (name for name in first if name != "lost, points"):
        cells = []
        for task in (first, second):
            lost = task["lost, points"].get(name)
            cells += [f"{task[name]['mean']:.2f}", "" if lost is None else f"{lost:.2f}"]
        for size, row in SIZES.items():
            if name.startswith(f"ratios of {row} "):
                step, bank = costs[size]["step"], costs[size]["making the bank"]
                cells += [str(size), f"{step['ratio']:.3f}", f"{step['floor']:.3f}"]
                cells += [f"{bank['ratio']:.3f}", f"{bank['floor']:.3f}"]
        lines.append(f"{name:42}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.token_budget", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--count", type=int, default=400, help="figures a cell")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other characters")
    parser.add_argument("--rounds", type=int, default=3, help="steps measured")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, though there is a GPU")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    options = parser.parse_args(given)
    try:
        step_cost.start_host(options.cpu)
    except step_cost.Refused as error:
        print(error, file=sys.stderr)
        return 2
    result = measure(options.count, options.seed, options.rounds)
    print(json.dumps(result) if options.json else text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
