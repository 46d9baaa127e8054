"""Build Retrieval Dataset and Preview Retrieval Dataset in the host."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
from pathlib import Path

import comfy.model_management as management
import comfy.utils
import folder_paths
import numpy as np
import pytest
from conftest import LACKING
from PIL import Image
from retrieval_pack.nodes.build_retrieval_dataset import RetrievalBuildDataset
from retrieval_pack.nodes.host import dataset_folder
from retrieval_pack.nodes.preview_retrieval_dataset import CONNECTED, RetrievalPreviewDataset
from retrieval_pack.retrieval_core.paperdoll.draw import render
from retrieval_pack.retrieval_core.paperdoll.world import (
    Figure,
    random_identity,
    random_outfit,
    random_scene,
)
from serving import messages

builds = pytest.mark.skipif(bool(LACKING), reason="see the line at the end of the tests")
CHARACTERS = 7


def draw_pictures(folder: Path, characters: int = CHARACTERS, seed: int = 0) -> None:
    """Paper dolls in two outfits, a folder for each character, masks and head boxes beside."""
    rng = np.random.default_rng(seed)
    for character in range(characters):
        who = random_identity(rng)
        home = folder / f"doll {character}"
        home.mkdir(parents=True)
        for outfit, clothes in enumerate((random_outfit(rng), random_outfit(rng))):
            for number in range(3):
                drawn = render(Figure(who, clothes, random_scene(rng)))
                path = home / f"{outfit}-{number}.png"
                Image.fromarray(drawn.image).resize((128, 128), 0).save(path)
                mask = Image.fromarray(np.uint8(255) * drawn.mask)
                mask.resize((128, 128), 0).save(path.with_suffix(".mask.png"))
                box = [2 * int(edge) for edge in drawn.head_box]
                path.with_suffix(".box.json").write_text(json.dumps(box))


def read_files(folder: Path) -> dict[str, str]:
    """Path -> digest of all files in a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


@pytest.fixture
def place(monkeypatch, tmp_path):
    """A folder with the host's folders input, datasets and temp in it."""
    datasets = ([str(tmp_path / "datasets")], set())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "datasets", datasets)
    for kind in ("input", "temp"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    return tmp_path


def build(source: str = "dolls", name: str = "mine", copy: bool = False, **settings):
    return RetrievalBuildDataset.execute(source, name, "garments", copy, **settings)


def refused(call, *arguments, **named) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments, **named)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and ". " not in message, message
    return message


def test_the_folder_is_the_hosts_own():
    (home,) = folder_paths.folder_names_and_paths["datasets"][0]
    assert home == str(Path(folder_paths.models_dir).with_name("datasets"))


@builds
@pytest.mark.parametrize("copy", [False, True])
def test_a_folder_becomes_a_data_set(place, copy):
    draw_pictures(place / "input" / "dolls")
    (place / "input" / "dolls" / "doll 0" / "broken.png").write_bytes(b"no picture")
    before = read_files(place / "input")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    made = build(copy=copy)
    data_set, report = made.args
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert read_files(place / "input") == before
    assert data_set.folder == place / "datasets" / "mine"
    assert len(data_set) == 6 * CHARACTERS
    lines = dict(line.split(": ", 1) for line in report.splitlines()[1:])
    assert report.startswith("mine\n")
    assert (lines["seen"], lines["kept"]) == (str(6 * CHARACTERS + 1), str(6 * CHARACTERS))
    assert lines["rejected"] == "1 not a picture"
    assert lines["characters"] == str(CHARACTERS)
    assert int(lines["outfits"]) >= CHARACTERS
    assert (data_set.folder / "images").is_dir() is copy
    assert dataset_folder.list_data_sets() == ["mine"]
    shown = made.ui
    assert shown["text"] == (report,) and len(shown["images"]) == 1


@builds
def test_the_engine_neither_reports_its_use_nor_fills_the_log(place, caplog, capfd):
    draw_pictures(place / "input" / "dolls", 2)
    with caplog.at_level(logging.INFO):
        build()
    from daft.scarf_telemetry import opted_out

    assert opted_out() and os.environ["DAFT_PROGRESS_BAR"] == "0"
    assert not caplog.records
    printed = capfd.readouterr()
    assert not printed.err and not printed.out


@builds
def test_a_data_set_is_shown_by_name_and_by_socket(place):
    draw_pictures(place / "input" / "dolls")
    data_set, _ = build(name="group/mine").args
    assert "group/mine" in RetrievalPreviewDataset.GET_SCHEMA().inputs[0].options
    by_name = RetrievalPreviewDataset.execute("group/mine", 0)
    sheet, report = by_name.args
    assert sheet.shape[0] == 1 and sheet.shape[-1] == 3 and 0 <= sheet.min() < sheet.max() <= 1
    assert f"images: {6 * CHARACTERS}" in report.splitlines()
    assert f"with head box: {6 * CHARACTERS}" in report.splitlines()
    assert by_name.ui["text"] == (report,) and len(by_name.ui["images"]) == 1
    by_socket = RetrievalPreviewDataset.execute(CONNECTED, 0, data_set)
    assert by_socket.args[1] == report and (by_socket.args[0] == sheet).all()
    first, last = (RetrievalPreviewDataset.execute(CONNECTED, n, data_set)[0] for n in (1, 2))
    assert first.shape[1] > last.shape[1]  # of five characters and of the other two
    assert "2" in refused(RetrievalPreviewDataset.execute, CONNECTED, 3, data_set)
    assert "connect" in refused(RetrievalPreviewDataset.execute, CONNECTED, 0)
    assert "'gone'" in refused(RetrievalPreviewDataset.execute, "gone", 0)


@builds
def test_pages_show_every_picture_once(place):
    draw_pictures(place / "input" / "dolls")
    data_set, _ = build().args
    pages = [dataset_folder.select_page(data_set, page) for page in (1, 2)]
    images = [name for page in pages for name in page.index["image"].to_pylist()]
    assert sorted(images) == sorted(data_set.index["image"].to_pylist())
    for page in pages:
        for members in page.identities.members:
            assert len({page.read_row(row)["character"] for row in members.tolist()}) == 1
        for members in page.outfits.members:
            rows = [page.read_row(row) for row in members.tolist()]
            assert len({(row["character"], row["outfit"]) for row in rows}) == 1


@builds
def test_another_build_does_not_replace_a_data_set_and_the_same_one_does(place):
    for seed, name in enumerate(("dolls", "others")):
        draw_pictures(place / "input" / name, 2, seed)
    build()
    first = read_files(place / "datasets")
    assert "another command" in refused(build, "others")
    assert "another command" in refused(build, copy=True)
    assert read_files(place / "datasets") == first
    build()
    assert read_files(place / "datasets") == first
    (place / "datasets" / "notes").mkdir()
    (place / "datasets" / "notes" / "a.txt").write_text("mine")
    assert "not a data set" in refused(build, name="notes")
    assert (place / "datasets" / "notes" / "a.txt").read_text() == "mine"


@builds
def test_an_interrupted_build_leaves_no_data_set_and_the_next_one_is_whole(place, monkeypatch):
    draw_pictures(place / "input" / "dolls")
    moved = []

    def update(self, value, total=None, preview=None, **_):
        moved.append((value, total))
        if len(moved) == 2:
            management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", update)
    with pytest.raises(management.InterruptProcessingException):
        build()
    assert not management.processing_interrupted()
    assert not (place / "datasets" / "mine").exists() and dataset_folder.list_data_sets() == []
    build()
    assert moved[-1][0] == moved[-1][1]
    stopped = read_files(place / "datasets" / "mine")
    build(name="again")
    assert stopped == read_files(place / "datasets" / "again")


@pytest.mark.parametrize(
    "name",
    ["", " ", "../x", "a/../../x", "/etc/x", ".cache", "a\\..\\..\\x", "C:\\x", "a\nb", "a?",
     "a/b/c"],
)  # fmt: skip
def test_names_that_leave_the_folder_are_refused(place, name):
    (place / "input" / "dolls").mkdir()
    assert repr(name) in refused(build, name=name)
    assert not (place / "datasets").exists()


def test_a_link_out_of_the_folder_is_not_written_to(place):
    for folder in ("input/dolls", "datasets", "elsewhere"):
        (place / folder).mkdir()
    (place / "datasets" / "out").symlink_to(place / "elsewhere", target_is_directory=True)
    assert "'out/mine'" in refused(build, name="out/mine")
    assert not list((place / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "source",
    ["", " ", ".", "..", "../secret", "dolls/../../secret", "/etc", "{place}/secret",
     "{place}/input", "link", "link/deeper", "missing", "a\0b", "x" * 5000, "~", "\\\\host\\share"],
)  # fmt: skip
def test_no_other_folder_is_read(place, source):
    for folder in ("input/dolls", "secret/deeper"):
        (place / folder).mkdir(parents=True)
    (place / "input" / "link").symlink_to(place / "secret", target_is_directory=True)
    message = refused(build, source.format(place=place))
    assert str(place / "input") in message and "datasets" in message


def test_whether_another_folder_exists_is_not_told(place):
    (place / "secret").mkdir()
    told = {refused(build, f"{place}/{name}").replace(name, "") for name in ("secret", "none")}
    assert len(told) == 1


@builds
def test_a_source_is_found_by_its_whole_path_and_in_the_datasets_folder(place):
    draw_pictures(place / "datasets" / "raw", 2)
    (data_set, _) = build("raw").args
    (again, _) = build(str(place / "datasets" / "raw")).args
    assert len(data_set) == len(again) == 12
    assert "'doll 0'" not in refused(build, "raw/doll 0/0-0.png", "other")


@builds
def test_it_runs_again_when_the_source_changes(place):
    draw_pictures(place / "input" / "dolls", 2)
    before = RetrievalBuildDataset.fingerprint_inputs(source="dolls", name="mine")
    assert before == RetrievalBuildDataset.fingerprint_inputs(source="dolls", name="mine")
    build()
    shown = RetrievalPreviewDataset.fingerprint_inputs(name="mine", page=0)
    assert before == RetrievalBuildDataset.fingerprint_inputs(source="dolls", name="mine")
    (place / "input" / "dolls" / "doll 0" / "0-0.png").unlink()
    assert before != RetrievalBuildDataset.fingerprint_inputs(source="dolls", name="mine")
    build()
    assert shown != RetrievalPreviewDataset.fingerprint_inputs(name="mine", page=0)


@builds
@pytest.mark.parametrize("package", dataset_folder.PACKAGES)
def test_what_is_missing_is_told_before_the_work_starts(place, monkeypatch, package):
    draw_pictures(place / "input" / "dolls", 2)
    monkeypatch.setitem(sys.modules, package, None)
    message = refused(build)
    assert package in message and "pip install" in message and "[data]" in message
    assert not (place / "datasets").exists()


def test_models_are_named_as_on_the_hub(place):
    (place / "input" / "dolls").mkdir()
    assert "VQA" in refused(RetrievalBuildDataset.execute, "dolls", "mine", "answers", False)
    for name in ("/etc", "../x", "model"):
        assert repr(name) in refused(build, detector_repository=name)


def make_prompt(source: str, name: str) -> dict:
    given = {"source": source, "name": name, "outfits": "garments", "copy_pictures": False}
    shown = {"name": CONNECTED, "page": 0, "dataset": ["build", 0]}
    return {
        "build": {"class_type": "RetrievalBuildDataset", "inputs": given},
        "show": {"class_type": "RetrievalPreviewDataset", "inputs": shown},
    }


@builds
def test_on_a_running_server(server):
    base = server.log.parent
    draw_pictures(base / "input" / "dolls")
    entry = server.run(make_prompt("dolls", "served"))
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])
    assert (base / "datasets" / "served" / "dataset.json").is_file()
    assert server.images(entry, "show").shape[-1] == 3
    assert entry["outputs"]["build"]["text"][0].startswith("served\n")
    assert '"served"' in json.dumps(server.json("/object_info/RetrievalPreviewDataset"))
    wrong = server.run(make_prompt("/etc", "served"))
    (error,) = messages(wrong, "execution_error")
    assert "'/etc'" in error["exception_message"]
    assert "UdfOperator" not in server.tail()


@builds
def test_an_interruption_on_a_running_server(server):
    base = server.log.parent
    draw_pictures(base / "input" / "many", 150)
    stopped = server.queue(make_prompt("many", "many"))
    # Once the first chunk of pictures was measured, of four.
    work = base / "datasets" / ".cache" / "data-build"
    server.wait(lambda: list(work.glob("*/measure-*/*.parquet")))

    def interrupt():
        server.post("/interrupt", {})
        return server.finished(stopped)

    entry = server.wait(interrupt)
    assert messages(entry, "execution_interrupted"), json.dumps(entry["status"])
    assert not (base / "datasets" / "many").exists()
    assert list(work.glob("*/measure-*/*.parquet"))  # to go on from
    entry = server.run(make_prompt("many", "many"))
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])
