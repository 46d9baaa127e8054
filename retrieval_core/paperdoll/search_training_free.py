"""Searches what carries identity over best in the training-free mode: see `main` for the command.

A row is one `Setting`, a mechanism of the literature or one tried here, drawn from the same prompts
and noise as the base model's row. One JSON object a line: attribute match, text following, leak of
the references' background, and the time of sampling relative to the base model's. What the pack
ships is in `retrieval_core.training_free`; what did not help is only here.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from .bundle import BASE_FILE, JUDGE_FILE, find_bundled
from .cases import Case, make_character_case
from .generate import Sampling, draw_noise
from .judge import Attributes, load_judge
from .measure import make_parser, measure_following, measure_leak, measure_matches
from .model import load_base
from .search_mechanisms import Drawing, References
from .search_rows import OFF, choose_rows, draw_combinations, list_rows


def summarise(cases: Sequence[Case], found: Sequence[Attributes]) -> dict[str, Any]:
    """Match, text following and leak, in percent of figures."""
    following = measure_following(cases, found)
    return {
        "match": measure_matches(cases, found),
        "text": {"mean": round(sum(following.values()) / len(following), 2), **following},
        "leak": measure_leak(cases, found),
    }


def search(options: argparse.Namespace) -> None:
    """Draws all rows and prints each row's line."""
    base = load_base(find_bundled(BASE_FILE, options.weights)).to(options.device)
    judge = load_judge(find_bundled(JUDGE_FILE, options.weights)).to(options.device)
    how, started = Sampling(options.steps, options.cfg), time.monotonic()
    cases = [
        make_character_case(options.seed, i, masked=not options.unmasked)
        for i in range(options.count)
    ]
    noise = torch.cat([draw_noise(base, options.seed, i) for i in range(options.count)])
    noise = noise.to(options.device)
    rows = list_rows() | draw_combinations(options.random, options.random_seed)
    rows = {n: s for n, s in rows.items() if any(fnmatch.fnmatch(n, p) for p in options.rows)}
    part, parts = map(int, options.part.split("/"))
    chosen = [("base", OFF), *choose_rows(rows, part, parts)]
    batches = []
    for start in range(0, options.count, options.batch):
        batch = cases[start : start + options.batch]
        with torch.inference_mode():
            encoded = {n: References.encode(base, batch, n) for n in options.references}
        batches.append((encoded, [c.prompt for c in batch], noise[start : start + options.batch]))
    plain = 0.0
    for name, setting in chosen:
        if options.seconds and time.monotonic() - started > options.seconds:
            return
        for count in options.references[: 1 if setting is OFF else None]:
            pictures, spent = [], 0.0
            for encoded, prompts, unit in batches:
                drawing = Drawing(base, encoded[count], setting)
                with torch.inference_mode():
                    drawing.read_ahead(how.steps)
                    began = synchronise(options.device)
                    pictures.append(drawing.sample(prompts, unit, how))
                    spent += synchronise(options.device) - began
                if len(batches) > 1:  # features of all of them may not fit into memory
                    encoded[count].cached.clear()
            line = summarise(cases, judge.read(torch.cat(pictures)))
            plain = plain or spent
            line |= {"cost": round(spent / plain, 3), "setting": setting.describe()}
            print(json.dumps({"row": name, "references": count, **line}), flush=True)


def synchronise(device: str) -> float:
    """The time when the device has finished."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("search_training_free", 200)
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of rows' names")
    parser.add_argument("--part", default="0/1", help="i/n: every nth row from the i-th")
    parser.add_argument("--random", type=int, default=0, help="number of random combinations")
    parser.add_argument("--random-seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="begin no row after as many")
    parser.add_argument("--references", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--unmasked", action="store_true", help="references with background")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=40, help="figures drawn at once")
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--cfg", type=float, default=Sampling.cfg)
    search(parser.parse_args(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
