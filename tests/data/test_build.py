"""Building a data set: every picture accounted for, stopped builds, refusals, the command."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from letters import count_letters
from PIL import Image, ImageDraw
from refusal import sentence

from retrieval_core.data import stages
from retrieval_core.data.__main__ import main
from retrieval_core.data.building import build_data_set
from retrieval_core.data.data_set import open_data_set
from retrieval_core.data.filtering import load_rules
from retrieval_core.data.stages import read_results, run_stage
from retrieval_core.paperdoll.booru import make_booru

PACK = Path(__file__).parents[2]
CHARACTERS = ("anna", "berta", "clara")


def draw_picture(seed: int, size: tuple[int, int] = (60, 80)) -> Image.Image:
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", size, tuple(rng.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y, w, h = rng.integers(0, 60, 4).tolist()
        pen.rectangle((x, y, x + w, y + h), tuple(rng.integers(0, 256, 3).tolist()))
    return picture


def write_folders(folder: Path, each: int = 4) -> Path:
    """A source of plain folders by character."""
    for number, character in enumerate(CHARACTERS):
        (folder / character).mkdir(parents=True)
        for picture in range(each):
            draw_picture(100 * number + picture).save(folder / character / f"{picture}.png")
    return folder


def build(source: Path, out: Path, cache: Path | None = None, **options):
    cache = cache or out.with_name("cache")
    return build_data_set([source], out, rules=load_rules(), cache=cache, **options)


def read_tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def stamp_tree(folder: Path) -> dict[str, tuple[int, int]]:
    found = {path: path.lstat() for path in sorted(folder.rglob("*"))}
    return {str(path): (one.st_mtime_ns, one.st_size) for path, one in found.items()}


@dataclass(frozen=True)
class Middle:
    """Annotator that finds every figure in the middle of its picture."""

    kind: str
    fingerprint: str = "middle"

    def annotate(self, pictures) -> list:
        if self.kind == "head_box":
            return [(20, 10, 40, 30)] * len(pictures)
        masks = [np.zeros(picture.image.shape[:2], bool) for picture in pictures]
        for mask in masks:
            mask[5:75, 15:45] = True
        return masks


def test_bad_input_is_counted_by_reason_and_the_source_stays_as_it_is(tmp_path):
    source = tmp_path / "source"
    (source / "original").mkdir(parents=True)
    draw_picture(0).save(tmp_path / "outside.png")
    lines = []

    def post(number: int, character: str = "anna", tags: str = "dress") -> Path:
        path = source / "original" / f"{number}.png"
        kinds = {"general": tags, "character": character, "artist": "painter", "meta": ""}
        named = {f"tag_string_{kind}": text for kind, text in kinds.items()}
        lines.append(json.dumps({"id": number, "file_ext": "png", **named}))
        return path

    for number in range(4):
        draw_picture(number).save(post(number))
    for number in (4, 5):
        draw_picture(number).save(post(number, "../../etc/<passwd>"))
    lines.append(lines[0])  # the same picture twice
    draw_picture(6).save(post(6, "only_one"))
    post(7)  # missing
    post(8).write_bytes(b"")
    whole = (source / "original" / "0.png").read_bytes()
    post(9).write_bytes(whole[:200])
    Image.new("1", (20000, 20000)).save(post(10))
    post(11).symlink_to(tmp_path / "outside.png")
    draw_picture(0).save(post(12), compress_level=0)  # the first once more
    post(13).write_text("not a picture")
    lines.append(lines[0][:50])
    (source / "posts.json").write_text("\n".join(lines) + "\n")

    before, contents = stamp_tree(source), read_tree(source)
    figures = build(source, tmp_path / "out", copy=True)
    assert (stamp_tree(source), read_tree(source)) == (before, contents)
    assert figures["rejected"] == {
        "near-duplicate": 1,
        "not a picture": 1,
        "only picture of its character": 1,
        "outside of the source's folder": 1,
        "picture damaged": 1,
        "picture file empty": 1,
        "picture missing": 1,
        "picture with too many pixels": 1,
        "two pictures of one name": 1,
        "unreadable metadata": 1,
    }
    assert (figures["seen"], figures["kept"]) == (len(lines), 6)
    assert figures["seen"] == figures["kept"] + sum(figures["rejected"].values())
    data_set = open_data_set(tmp_path / "out")
    assert [len(data_set[row].image) for row in range(len(data_set))] == [80] * 6
    assert {path.name for path in tmp_path.iterdir()} == {"source", "outside.png", "out", "cache"}


def test_a_booru_of_paper_dolls_is_accounted_for(tmp_path):
    make_booru(tmp_path / "booru", 300)
    truth = pq.read_table(tmp_path / "booru" / "truth.parquet").to_pylist()
    told: list[tuple] = []
    figures = build(
        tmp_path / "booru" / "booru", tmp_path / "out", on_progress=lambda *a: told.append(a)
    )
    kinds = [row["kind"] for row in truth]
    copies = sum(kinds.count(f"{kind} copy") for kind in ("re-encoded", "resized", "brightened"))
    rejected = figures["rejected"]
    assert figures["seen"] == 300 == figures["kept"] + sum(rejected.values())
    assert rejected["near-duplicate"] == copies > 10
    assert rejected["picture damaged"] == kinds.count("truncated file")
    assert rejected["unwanted tag"] == kinds.count("unwanted tag")
    assert figures["outfits"] > figures["characters"] > 5
    assert [stage for stage, done, total, *_ in told if done == total] == [
        "scan", "measure", "annotate", "garments",
    ]  # fmt: skip


def test_shards_are_annotated_copied_and_opened(tmp_path):
    (tmp_path / "source").mkdir()
    with tarfile.open(tmp_path / "source" / "0.tar", "w") as shard:
        for number in range(4):
            buffer = io.BytesIO()
            draw_picture(number).save(buffer, "PNG")
            text = json.dumps({"character": "anna", "tags": ["dress"]}).encode()
            for ending, content in (("png", buffer.getvalue()), ("json", text)):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    annotators = [Middle("mask"), Middle("head_box")]
    figures = build(tmp_path / "source", tmp_path / "out", annotators=annotators)
    assert (figures["kept"], figures["outfits"]) == (4, 4)
    data_set = open_data_set(tmp_path / "out")
    assert (data_set[2].image == np.asarray(draw_picture(2))).all()
    assert data_set[2].mask.sum() == 30 * 70 and data_set[2].head_box == (20, 10, 40, 30)


def test_the_same_command_replaces_a_data_set_and_another_does_not(tmp_path):
    source, out = write_folders(tmp_path / "source"), tmp_path / "out"
    build(source, out)
    draw_picture(50).save(source / "anna" / "more.png")
    assert build(source, out)["kept"] == 13
    assert len(open_data_set(out)) == 13
    assert "another command" in sentence(build, source, out, copy=True)
    assert len(open_data_set(out)) == 13


def test_nothing_but_a_data_set_is_replaced_and_no_source_is_written_into(tmp_path):
    source = write_folders(tmp_path / "source")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "not a data set" in sentence(build, source, tmp_path / "mine")
    assert read_tree(tmp_path / "mine") == {"thesis.txt": b"years of work"}
    assert "into the source" in sentence(build, source, source / "out", tmp_path / "cache")
    assert "into the source" in sentence(build, source, tmp_path / "out", source / "cache")
    (tmp_path / "empty").mkdir()
    assert build(source, tmp_path / "empty")["kept"] == 12


def test_a_build_without_a_usable_picture_says_why(tmp_path):
    (tmp_path / "source" / "anna").mkdir(parents=True)
    (tmp_path / "source" / "anna" / "0.png").write_bytes(b"")
    assert "1 picture file empty" in sentence(build, tmp_path / "source", tmp_path / "out")


def test_a_full_disk_is_one_sentence_and_the_build_goes_on_later(tmp_path, monkeypatch):
    source, out = write_folders(tmp_path / "source"), tmp_path / "out"
    write = pq.write_table

    def fail_on(ending: str):
        def write_some(table, path, **options):
            if ending in str(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(table, path, **options)

        return write_some

    for ending in ("measure", "garments"):
        monkeypatch.setattr(pq, "write_table", fail_on(ending))
        assert "No space left" in sentence(build, source, out)
        assert not out.exists() and not list(tmp_path.glob(".out*"))
    monkeypatch.undo()
    assert build(source, out)["kept"] == 12


@pytest.fixture
def helpers_everywhere(monkeypatch):
    """Processes of the engine can import the tests' helpers."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PACK), str(PACK / "tests" / "helpers")]))


# Few chunks run in threads, many in processes.
@pytest.mark.parametrize("count", [2, 8])
def test_a_stage_runs_only_the_chunks_without_a_result(tmp_path, helpers_everywhere, count):
    chunks = ["x" * i for i in range(count)]
    told: list[tuple] = []
    paths = run_stage("count-1", count_letters, chunks[:-1], tmp_path)
    first, _ = read_results(paths)
    paths = run_stage(
        "count-1", count_letters, chunks, tmp_path, on_progress=lambda *a: told.append(a)
    )
    rows, rejected = read_results(paths)
    assert rows["letters"].to_pylist() == list(range(count))
    assert rows.slice(0, count - 1).equals(first)
    assert rejected == {"vowels": count}
    assert told[0] == (1, count, 1, 1) and told[-1] == (count, count, count, count)
    others = run_stage("count-1", count_letters, chunks, tmp_path, settings={"of": "others"})
    assert not set(others) & set(paths)


@pytest.mark.parametrize("count", [2, 8])
def test_an_error_in_a_stage_is_one_sentence(tmp_path, helpers_everywhere, count):
    chunks = ["x" * i for i in range(1, count)]
    wrong = sentence(run_stage, "count-1", count_letters, [*chunks, "wrong"], tmp_path)
    assert wrong == "The chunk is 'wrong'; give another."
    broken = sentence(run_stage, "count-1", count_letters, [*chunks, "broken"], tmp_path)
    assert "'count-1'" in broken and "division by zero" in broken


@pytest.mark.parametrize("count", [2, 8])
def test_a_stage_is_interrupted_by_what_its_progress_raises(tmp_path, helpers_everywhere, count):
    class Interrupted(Exception):
        pass

    def interrupt(*_: int) -> None:
        raise Interrupted

    chunks = ["x" * i for i in range(count)]
    with pytest.raises(Interrupted):
        run_stage("count-1", count_letters, chunks, tmp_path, on_progress=interrupt)
    rows, _ = read_results(run_stage("count-1", count_letters, chunks, tmp_path))
    assert rows["letters"].to_pylist() == list(range(count))


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "daft", None)
    assert "[data]" in sentence(stages.import_library, "daft", "data")


def test_the_engine_does_not_report_its_use():
    """In a process that knows nothing of it but the command's import."""
    code = (
        "import retrieval_core.data.__main__\n"
        "from daft.scarf_telemetry import opted_out\n"
        "assert opted_out()"
    )
    switches = ("DAFT_ANALYTICS_ENABLED", "SCARF_NO_ANALYTICS", "DO_NOT_TRACK")
    environment = {k: v for k, v in os.environ.items() if k not in switches}
    subprocess.run([sys.executable, "-c", code], cwd=PACK, env=environment, check=True)


def command(source: Path, out: Path, cache: Path) -> list[str]:
    module = [sys.executable, "-m", "retrieval_core.data", "build", str(source)]
    return [*module, "--out", str(out), "--cache", str(cache), "--json"]


def run_command(source: Path, out: Path, cache: Path) -> dict:
    done = subprocess.run(
        command(source, out, cache), cwd=PACK, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def kill_builds(folder: Path, count: int, kills: int) -> None:
    """Kills a build at random moments and starts it again, until so many kills hit one."""
    make_booru(folder / "booru", count)
    source, out, cache = folder / "booru" / "booru", folder / "out", folder / "cache"
    begun = time.monotonic()
    run_command(source, folder / "whole", folder / "other")
    seconds = time.monotonic() - begun
    rng, hits, unfinished = random.Random(0), 0, 0
    while hits < kills:
        process = subprocess.Popen(
            command(source, out, cache), cwd=PACK, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            process.wait(rng.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            hits += 1
            unfinished += any((cache / "data-build").rglob("*.parquet"))
        if out.exists():
            assert read_tree(out) == read_tree(folder / "whole")
            remove(out, cache)
    assert unfinished  # some kills came after work had been stored
    run_command(source, out, cache)
    assert read_tree(out) == read_tree(folder / "whole")
    assert not any((cache / "data-build").iterdir()) and not list(folder.glob(".out*"))


def remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_build_that_was_killed_gives_the_same_bytes(tmp_path):
    kill_builds(tmp_path, 600, 4)


@pytest.mark.slow
def test_a_build_that_was_killed_20_times_gives_the_same_bytes(tmp_path):
    kill_builds(tmp_path, 3000, 20)


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_machine_gives_the_same_bytes(tmp_path):
    ray_utils = pytest.importorskip("ray.cluster_utils")
    make_booru(tmp_path / "booru", 6000)
    source = tmp_path / "booru" / "booru"
    run_command(source, tmp_path / "whole", tmp_path / "other")
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = ray_utils.Cluster(initialize_head=True, head_node_args=head)
    try:
        machines = [cluster.add_node(num_cpus=1) for _ in range(2)]
        build_on_ray = command(source, tmp_path / "out", tmp_path / "cache")
        build_on_ray += ["--ray", cluster.address]
        process = subprocess.Popen(build_on_ray, cwd=PACK, stdout=subprocess.PIPE)
        measured = tmp_path / "cache" / "data-build"
        while len(list(measured.rglob("measure-1/*.parquet"))) < 3:
            assert process.poll() is None
            time.sleep(0.02)
        cluster.remove_node(machines[1], allow_graceful=False)
        assert process.poll() is None
        assert len(list(measured.rglob("garments-1/*.parquet"))) == 0
        process.communicate(timeout=300)
        assert process.returncode == 0
    finally:
        cluster.shutdown()
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "whole")


def test_the_command_builds_checks_counts_and_shows(tmp_path, capsys):
    source, out = write_folders(tmp_path / "source"), tmp_path / "out"
    cache = ["--cache", str(tmp_path / "cache")]
    assert main(["build", str(source), "--out", str(out), *cache]) == 0
    assert "12" in capsys.readouterr().out
    assert main(["check", str(out)]) == 0
    assert main(["stats", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 12
    assert main(["sheet", str(out)]) == 0
    assert Image.open(tmp_path / "out.png").width > 100
    (source / "anna" / "0.png").unlink()
    assert main(["check", str(out), "--json"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"the picture is missing": 1}
    assert main(["build", str(tmp_path / "none"), "--out", str(tmp_path / "x"), *cache]) == 2
    assert "no source" in capsys.readouterr().err
    assert main(["build", str(source), "--out", str(out), "--outfits", "answers", *cache]) == 2
    assert "--vqa" in capsys.readouterr().err


def test_the_digest_of_what_was_made_does_not_depend_on_the_folders(tmp_path):
    prints = []
    for name in ("one", "two"):
        build(write_folders(tmp_path / name / "source"), tmp_path / name / "out")
        prints.append(open_data_set(tmp_path / name / "out").info["fingerprint"])
    assert prints[0] == prints[1]
