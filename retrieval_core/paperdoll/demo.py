"""`python run.py demo`: runs the whole method on the bundled weights and writes PNG sheets."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..bank.tokens import Tokens
from ..data.prepare import PreparedReference, load_image, prepare
from ..errors import RetrievalError
from ..sampling.attention_map import draw_overlay
from ..sheets import Row, Tile, choose_colour, write_sheet
from .bundle import Bundle, load_bundle
from .cases import REFERENCES, Case, make_character_case, make_composition_case
from .generate import Sampling, apply_bank, encode_group, encode_groups, generate
from .measure import compute_chance_levels, measure_matches
from .text import CONCEPTS
from .world import SIZE

SHOWN = 6
BATCH = 12
TASKS = (
    ("same_character", "Same character", make_character_case),
    ("composition", "Face of one, clothes of another", make_composition_case),
)


def read_reference(text: str) -> PreparedReference:
    """A reference from the command line: `file.png`, `file.png:face` or `file.png:face:0.8`.

    Raises:
        RetrievalError: an unknown concept, a bad weight, or a file that is no image.
    """
    path, concept, weight = text, "figure", 1.0
    # From the right, and only where no file has that name (Windows paths contain a colon).
    if not Path(path).exists() and ":" in path:
        path, concept = path.rsplit(":", 1)
        if ":" in path and not Path(path).exists():
            with suppress(ValueError):
                weight = float(concept)
                path, concept = path.rsplit(":", 1)
    if concept not in CONCEPTS:
        raise RetrievalError(
            f"The reference '{text}' asks for {concept!r}; write FILE:CONCEPT with a concept of "
            f"{', '.join(CONCEPTS)}."
        )
    image, alpha = load_image(path)
    return prepare(image, alpha, concept, weight, SIZE)


def draw_pictures(
    bundle: Bundle, prompts: Sequence[str], tokens: Tokens, count: int, seed: int, how: Sampling
) -> tuple[Tensor, Tensor, Tensor]:
    """Without retrieval, with it, and the latter's retrieval map, from the same prompts and noise.

    count: number of references.
    """
    noise = bundle.base.noise(len(prompts), torch.Generator().manual_seed(seed))
    plain = generate(bundle, prompts, noise, None, how)
    retrieval = apply_bank(bundle.network, tokens, how)
    found = generate(bundle, prompts, noise, retrieval, how)
    colours = [choose_colour(i) for i in range(count)]
    return plain, found, draw_overlay(found, retrieval.shares.mean(), colours)


def show_task(
    bundle: Bundle,
    name: str,
    title: str,
    make_case: Callable[[int, int], Case],
    options: argparse.Namespace,
    how: Sampling,
) -> Path:
    """Writes one task's sheet and prints its match rates."""
    seed = options.seed
    cases, batches = [make_case(seed, i) for i in range(options.count)], []
    for start in tqdm(range(0, len(cases), BATCH), desc=name, disable=None, leave=False):
        batch = cases[start : start + BATCH]
        tokens = encode_groups(bundle.base, bundle.network, [case.references for case in batch])
        prompts = [case.prompt for case in batch]
        batches.append(draw_pictures(bundle, prompts, tokens, REFERENCES, seed + start, how))
    plain, found, maps = (torch.cat(column) for column in zip(*batches))
    rows = []
    for i, case in enumerate(cases[:SHOWN]):
        references = [
            Tile(r.image, r.concept, choose_colour(j)) for j, r in enumerate(case.references)
        ]
        results = [
            Tile(plain[i], "without retrieval"),
            Tile(found[i], "with retrieval"),
            Tile(maps[i], "retrieved from (frame colours)"),
        ]
        rows.append(Row(case.prompt, references, results))
    path = options.out / f"{name}.png"
    subtitle = "Each row: one prompt and one seed; the characters were never seen in training."
    write_sheet(path, title, subtitle, rows)
    with_rates = measure_matches(cases, bundle.judge.read(found))
    without = measure_matches(cases, bundle.judge.read(plain))
    levels = compute_chance_levels()
    print(f"\n{title}: attributes of the references found in {len(cases)} pictures")
    print(f"  {'':16}{'with':>8}{'without':>10}{'chance':>9}")
    for line in with_rates:
        print(f"  {line:16}{with_rates[line]:7.1f}%{without[line]:9.1f}%{levels[line]:8.1f}%")
    return path


def show_own(bundle: Bundle, options: argparse.Namespace, how: Sampling) -> Path:
    """Writes the sheet of the user's own references: four pictures with and without, and maps."""
    prepared = [read_reference(reference) for reference in options.reference]
    tokens, prompts = encode_group(bundle.base, bundle.network, prepared), [options.prompt] * 4
    plain, found, maps = draw_pictures(bundle, prompts, tokens, len(prepared), options.seed, how)
    tiles = [
        Tile(r.image, f"{r.concept}, weight {r.weight:g}", choose_colour(i))
        for i, r in enumerate(prepared)
    ]
    rows = [
        Row("without retrieval", [], [Tile(p) for p in plain]),
        Row("with retrieval", tiles[:8], [Tile(p) for p in found]),
        Row("retrieved from (frame colours)", tiles[8:], [Tile(p) for p in maps]),
    ]
    path = options.out / "own_references.png"
    write_sheet(path, "Your references", f"Prompt: {options.prompt or '(empty)'}", rows)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python run.py demo", description=__doc__)
    parser.add_argument(
        "--reference", action="append", metavar="FILE[:CONCEPT[:WEIGHT]]", default=[],
        help="your own image; the concept is figure, face or clothes; may be given several times",
    )  # fmt: skip
    parser.add_argument("--prompt", default="waving, smile, beach", help="tags, with commas")
    parser.add_argument("--out", type=Path, default=Path("output/demo"))
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--count", type=int, default=24, help="pictures measured per task")
    parser.add_argument("--strength", type=float, help="default: as the network recommends")
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--cfg", type=float, default=Sampling.cfg)
    parser.add_argument("--weights", type=Path, help="folder of the weights, default: bundled")
    options = parser.parse_args(arguments)
    how = Sampling(options.steps, options.cfg, strength=options.strength)
    started = time.perf_counter()
    try:
        if options.count < 1 or not 0 <= options.seed < 2**31:
            raise RetrievalError(
                f"The count is {options.count} and the seed {options.seed}; give a count of 1 or "
                "more and a seed from 0 to 2147483647."
            )
        bundle = load_bundle(options.weights)
        if options.reference:
            paths = [show_own(bundle, options, how)]
        else:
            paths = [show_task(bundle, *task, options, how) for task in TASKS]
    except RetrievalError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    print()
    for path in paths:
        print(f"Wrote {path.resolve()}")
    print(f"Generation took {time.perf_counter() - started:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
