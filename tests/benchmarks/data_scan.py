"""Speed and memory of scanning metadata: lines a second and core, and their growth with lines.

`python -m tests.benchmarks.data_scan` writes lines like those of Danbooru 2021 (1.6 KB, one in a
thousand unreadable) and scans them as the build does, in one process and by its engine, each size
in processes of its own. Beside that: the parser alone, the standard library's, and Daft's readers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_core.data.filtering import LISTS, Rules, load_rules
from retrieval_core.data.sources import Chunk, find_chunks, read_chunk
from retrieval_core.data.stages import read_results, run_stage

if TYPE_CHECKING:
    import pyarrow as pa

# Shares of posts that a filter rejects, roughly those of the paper: 599,192 of 855,880 stayed.
UNWANTED, SEVERAL, NONE, BARE, UNREADABLE = 0.08, 0.1, 0.05, 0.05, 0.001
GENERAL = (
    "1girl solo long_hair looking_at_viewer blush smile open_mouth short_hair blue_eyes brown_hair "
    "simple_background white_background blonde_hair black_hair red_eyes hair_between_eyes standing "
    "closed_mouth bangs full_body upper_body sitting outdoors indoors sky day cloud water tree "
    "flower cowboy_shot twintails ponytail braid very_long_hair green_eyes purple_eyes ahoge "
    "sidelocks medium_breasts collarbone heart star_(symbol) holding food petals night moon window"
).split()


def write_metadata(path: Path, count: int, unreadable: float, seed: int = 0) -> None:
    """Writes `count` lines with the fields and lengths of Danbooru 2021's."""
    rng = random.Random(seed)
    clothing = sorted(load_rules().clothing)
    trivial = _read_tags(LISTS / "trivial_clothing.txt")
    unwanted = _read_tags(LISTS / "unwanted.txt")
    with open(path, "w", encoding="utf-8") as file:
        for number in range(1, count + 1):
            general = rng.sample(GENERAL, rng.randint(12, 24)) + rng.sample(trivial, 4)
            general += [] if rng.random() < BARE else rng.sample(clothing, 3)
            general += [rng.choice(unwanted)] if rng.random() < UNWANTED else []
            draw = rng.random()
            people = 0 if draw < NONE else 2 if draw < NONE + SEVERAL else 1
            kinds = {
                "general": sorted(set(general)),
                "character": [f"character_{rng.randrange(20000)}_(series)" for _ in range(people)],
                "copyright": [f"series_{rng.randrange(2000)}"],
                "artist": [f"artist_{rng.randrange(30000)}"],
                "meta": ["highres"],
            }
            line = json.dumps(_describe(number, kinds, rng))
            cut = len(line) // 2 if rng.random() < unreadable else len(line)
            file.write(line[:cut] + "\n")


def _read_tags(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _describe(number: int, kinds: dict[str, list[str]], rng: random.Random) -> dict[str, Any]:
    digest = f"{rng.getrandbits(128):032x}"
    date = "2021-07-14T12:31:05.123-04:00"
    return {
        "id": number, "created_at": date, "uploader_id": rng.randrange(10**6),
        "score": rng.randrange(200), "source": f"https://i.pximg.net/img/{number}_p0.png",
        "md5": digest, "last_comment_bumped_at": None, "rating": "s", "image_width": 1447,
        "image_height": 2046, "tag_string": " ".join(sorted(sum(kinds.values(), []))),
        "fav_count": rng.randrange(300), "file_ext": rng.choice(["jpg", "png"]),
        "last_noted_at": None, "parent_id": None, "has_children": False, "approver_id": None,
        **{f"tag_count_{kind}": len(tags) for kind, tags in kinds.items()},
        "file_size": rng.randrange(10**7), "up_score": 30, "down_score": 0, "is_pending": False,
        "is_flagged": False, "is_deleted": False, "tag_count": sum(map(len, kinds.values())),
        "updated_at": date, "is_banned": False, "pixiv_id": number, "bit_flags": 0,
        **{f"tag_string_{kind}": " ".join(tags) for kind, tags in kinds.items()},
    }  # fmt: skip


def scan(path: Path) -> dict[str, int]:
    """What the build does: rows of the posts that stay, one chunk after the other."""
    rules, kept, rejected = load_rules(), 0, 0
    for chunk in find_chunks(path):
        table, reasons = read_chunk(chunk, rules)
        kept += table.num_rows
        rejected += sum(reasons.values())
    return {"kept": kept, "rejected": rejected}


def scan_by_engine(path: Path) -> dict[str, int]:
    """The same as a stage of the build, on all cores, with its results written."""
    chunks = [asdict(chunk) for chunk in find_chunks(path)]
    with tempfile.TemporaryDirectory() as folder:
        results = run_stage("scan", partial(scan_chunk, load_rules()), chunks, Path(folder))
        table, reasons = read_results(results)
    return {"kept": table.num_rows, "rejected": sum(reasons.values())}


def scan_chunk(rules: Rules, chunk: Mapping[str, Any]) -> tuple[pa.Table, dict[str, int]]:
    return read_chunk(Chunk(**chunk), rules)


def parse_by_orjson(path: Path) -> dict[str, int]:
    import orjson

    return _parse(path, orjson.loads)


def parse_by_json(path: Path) -> dict[str, int]:
    return _parse(path, json.loads)


def _parse(path: Path, loads: Callable[[bytes], Any]) -> dict[str, int]:
    kept = rejected = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                loads(line)
                kept += 1
            except ValueError:
                rejected += 1
    return {"kept": kept, "rejected": rejected}


def parse_by_daft(path: Path) -> dict[str, int]:
    """Daft's JSON lines into the columns that a scan needs, without any filter."""
    import daft

    texts = ["file_ext", *(f"tag_string_{kind}" for kind in ("general", "character", "artist"))]
    schema = {"id": daft.DataType.int64(), **dict.fromkeys(texts, daft.DataType.string())}
    frame = daft.read_json(str(path), infer_schema=False, schema=schema)
    return {"kept": frame.select(*schema).to_arrow().num_rows, "rejected": 0}


def parse_by_daft_text(path: Path) -> dict[str, int]:
    """Lines by Daft, parsed and filtered by a Python function over its batches."""
    import daft
    import orjson

    @daft.func.batch(return_dtype=daft.DataType.bool())
    def parses(lines: daft.Series) -> list[bool]:
        found = []
        for line in lines.to_pylist():
            try:
                orjson.loads(line)
                found.append(True)
            except ValueError:
                found.append(False)
        return found

    frame = daft.read_text(str(path)).select(parses(daft.col("text")).alias("parses"))
    values = frame.to_pydict()["parses"]
    return {"kept": sum(values), "rejected": len(values) - sum(values)}


WAYS = {
    "scan": scan,
    "scan by engine": scan_by_engine,
    "orjson alone": parse_by_orjson,
    "json alone": parse_by_json,
    "Daft read_json": parse_by_daft,  # ends with an error at an unreadable line
    "Daft, whole": parse_by_daft,  # so it is also given a file without such lines
    "Daft read_text": parse_by_daft_text,
}


def measure(way: str, path: Path) -> dict[str, Any]:
    """Runs one way in this process: seconds, CPU seconds, lines, and the highest memory.

    Importing the libraries takes as long as thousands of lines and is left out.
    """
    import daft  # noqa: F401
    import orjson  # noqa: F401
    import pyarrow  # noqa: F401

    start, before = time.perf_counter(), _sum_cpu()
    found = WAYS[way](path)
    seconds, cpu = time.perf_counter() - start, _sum_cpu() - before
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)  # of the children, the largest one
    peak = max(resource.getrusage(who).ru_maxrss for who in whose) / 1024  # Linux counts in KiB
    lines = sum(found.values())
    return {
        "way": way, "lines": lines, **found, "seconds": seconds, "cpu seconds": cpu,
        "lines per cpu second": lines / cpu, "peak MiB": peak,
    }  # fmt: skip


def _sum_cpu() -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def text(results: Sequence[dict[str, Any]]) -> str:
    """One line for each way and size."""
    heads = ("lines", "kept", "seconds", "cpu", "lines/cpu s", "peak MiB")
    rows = [f"{'':16}" + "".join(f"{head:>13}" for head in heads)]
    for one in results:
        if "error" in one:
            rows.append(f"{one['way']:16}  {one['error']}")
            continue
        cells = (
            f"{one['lines']}", f"{one['kept']}", f"{one['seconds']:.2f}",
            f"{one['cpu seconds']:.2f}", f"{one['lines per cpu second']:.0f}",
            f"{one['peak MiB']:.0f}",
        )  # fmt: skip
        rows.append(f"{one['way']:16}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(rows)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.data_scan", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--lines", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--folder", type=Path, help="for the metadata; a temporary one by default")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.one:
        way, path = options.one
        print(json.dumps(measure(way, Path(path))))
        return 0
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for count in options.lines:
            path, whole = (Path(folder) / f"{name}{count}.jsonl" for name in ("posts", "whole"))
            write_metadata(path, count, UNREADABLE)
            if "Daft, whole" in options.ways:
                write_metadata(whole, count, 0)
            for way in options.ways:
                results.append(_measure_apart(way, whole if way == "Daft, whole" else path))
            for made in (path, whole):
                made.unlink(missing_ok=True)
    print(json.dumps(results) if options.json else text(results))
    return 0


def _measure_apart(way: str, path: Path) -> dict[str, Any]:
    """`measure` in a process of its own, whose memory is only its own."""
    command = [sys.executable, "-m", "tests.benchmarks.data_scan", "--one", way, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"way": way, "error": done.stderr.strip().splitlines()[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
