"""`python -m retrieval_core.data`: builds a data set from tagged pictures (§3.1), and looks at one.

    build SOURCE... --out FOLDER   from folders by character, kohya's, gallery-dl's, Danbooru
                                   metadata or WebDataset shards; sources are never modified
    check FOLDER                   compares its pictures with what the index says
    stats FOLDER                   the figures of the paper's Table 1
    sheet FOLDER                   a contact sheet, to check by eye

A build that was stopped goes on from there with the same command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RetrievalError, import_library, run_command
from .annotators import load_annotators
from .building import build_data_set
from .contact_sheet import write_contact_sheet
from .data_set import check_data_set, count_stats, describe_figures, open_data_set
from .filtering import load_rules

CACHE = Path.home() / ".cache" / "retrieval_controlnet"
LISTED = 10  # pictures of a problem that are printed


class Bars:
    """Progress bars on the error stream, one for each stage."""

    def __init__(self) -> None:
        self._tqdm = import_library("tqdm", "data").tqdm
        self._stage, self._bar = "", None

    def show(self, stage: str, done: int, total: int, kept: int = 0, rejected: int = 0) -> None:
        """Shows that `done` of a stage's `total` chunks or pictures are done."""
        if stage != self._stage:
            self.close()
            self._stage, self._bar = stage, self._tqdm(desc=stage, total=total, file=sys.stderr)
        if kept or rejected:
            self._bar.set_postfix_str(f"{kept} kept, {rejected} rejected", refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m retrieval_core.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="builds a data set")
    build.add_argument("sources", type=Path, nargs="+", metavar="SOURCE")
    build.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the data set")
    build.add_argument("--copy", action="store_true", help="copies the pictures into it")
    build.add_argument(
        "--rules", type=Path, metavar="FOLDER",
        help="lists of tags to use instead of the pack's, in retrieval_core/data/tags",
    )  # fmt: skip
    build.add_argument(
        "--outfits", choices=("garments", "answers"), default="garments",
        help="what tells outfits apart: the garments' colours (default), which need masks and head "
        "boxes, or the paper's question, which needs --vqa",
    )  # fmt: skip
    build.add_argument(
        "--cache", type=Path, default=CACHE, metavar="FOLDER",
        help="of annotations and unfinished work (%(default)s)",
    )  # fmt: skip
    build.add_argument("--ray", metavar="ADDRESS", help="of a Ray cluster to build on")
    models = build.add_argument_group(
        "models (a name on the hub, or a folder); a mask or box beside a picture goes first"
    )
    models.add_argument("--detector", help="of heads, such as IDEA-Research/grounding-dino-tiny")
    models.add_argument("--segmenter", help="of figures, such as facebook/sam-vit-base")
    models.add_argument("--parts", help="such as CIDAS/clipseg-rd64-refined")
    models.add_argument("--vqa", help="such as Salesforce/instructblip-flan-t5-xl")
    check = commands.add_parser("check", help="compares pictures and index")
    stats = commands.add_parser("stats", help="prints its figures")
    sheet = commands.add_parser("sheet", help="writes a contact sheet")
    sheet.add_argument("--out", type=Path, metavar="FILE", help="PNG (FOLDER.png)")
    for command in (check, stats, sheet):
        command.add_argument("folder", type=Path, metavar="FOLDER")
    for command in (build, check, stats):
        command.add_argument("--json", action="store_true", help="figures on one line")
    return parser.parse_args(given)


def build(options: argparse.Namespace) -> int:
    if options.outfits == "answers" and not options.vqa:
        raise RetrievalError(
            "Outfits by answers need a model that answers; name one with --vqa, such as "
            "Salesforce/instructblip-flan-t5-xl, or leave --outfits out."
        )
    bars = Bars()
    annotators = load_annotators(
        options.detector, options.segmenter, options.parts, options.vqa,
        lambda done, total: bars.show("fetch models", done, total),
    )  # fmt: skip
    try:
        figures = build_data_set(
            options.sources,
            options.out,
            rules=load_rules(options.rules),
            annotators=annotators,
            outfits=options.outfits,
            copy=options.copy,
            cache=options.cache,
            ray=options.ray,
            on_progress=bars.show,
        )
    finally:
        bars.close()
    report(figures, options.json)
    return 0


def check(options: argparse.Namespace) -> int:
    bars = Bars()
    problems = check_data_set(options.folder, lambda done, total: bars.show("check", done, total))
    bars.close()
    if options.json:
        report({problem: len(pictures) for problem, pictures in problems.items()}, True)
    elif not problems:
        print(f"'{options.folder}' is as it was built.")
    for problem, pictures in {} if options.json else problems.items():
        print(f"{len(pictures)} x {problem}:")
        print("".join(f"  {picture}\n" for picture in pictures[:LISTED]), end="")
    return 1 if problems else 0


def stats(options: argparse.Namespace) -> int:
    report(count_stats(open_data_set(options.folder)), options.json)
    return 0


def sheet(options: argparse.Namespace) -> int:
    folder = options.folder.absolute()
    path = options.out or folder.with_name(f"{folder.name}.png")
    write_contact_sheet(open_data_set(folder), path)
    print(f"Wrote {path.resolve()}")
    return 0


def report(figures: Mapping[str, Any], as_json: bool) -> None:
    """Prints figures on one line of JSON, or a line each."""
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in describe_figures(figures).items():
        print(f"{name:20} {value}")


COMMANDS = {"build": build, "check": check, "stats": stats, "sheet": sheet}


def main(given: Sequence[str] | None = None) -> int:
    options = parse(given)
    return run_command(lambda: COMMANDS[options.command](options))


if __name__ == "__main__":
    sys.exit(main())
