"""Downloading a file from a hub, here one on the loopback."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from fake_hub import COMMIT, FakeHub, use_endpoint
from refusal import sentence
from safetensors.torch import save

from retrieval_core import hub
from retrieval_core.errors import RetrievalError

REPO = "someone/network"
FILE = "face.safetensors"
BODY = save({"w": torch.arange(250_000, dtype=torch.float32)}, {"format": "retrieval_controlnet"})
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    served = FakeHub(REPO, {FILE: BODY})
    yield served
    served.close()


@pytest.fixture
def fetch(server, tmp_path, monkeypatch):
    def ignore(done, total):
        pass

    def call(filename=FILE, revision=None, progress=ignore, repo=REPO, endpoint=server.url):
        use_endpoint(monkeypatch, endpoint)
        return hub.download(repo, filename, revision, tmp_path, progress)

    return call


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_file_arrives_whole_with_progress_and_is_not_fetched_again(fetch, server, tmp_path):
    seen = []
    path = fetch(progress=lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "someone--network" / FILE
    assert path.read_bytes() == BODY
    assert seen[-1] == (len(BODY), len(BODY))
    assert fetch() == path and len(server.gets) == 1
    assert not [name for name in files(tmp_path) if name.endswith(".part")]


def test_a_file_in_a_folder_of_the_repository(fetch, server, tmp_path):
    server.files["sub/two words.safetensors"] = BODY
    path = fetch("sub/two words.safetensors")
    assert path == tmp_path / "someone--network/sub/two words.safetensors"
    assert path.read_bytes() == BODY


def test_a_changed_file_is_fetched_again(fetch, server):
    fetch()
    server.files[FILE] = save({"w": torch.ones(3)})
    assert fetch().read_bytes() == server.files[FILE] and len(server.gets) == 2


def test_a_renamed_repository_is_followed(fetch):
    assert fetch(repo="renamed/repository").read_bytes() == BODY


def test_a_pinned_commit_that_is_here_needs_no_network(fetch, server):
    path = fetch(revision=COMMIT)
    server.requests = 0
    assert fetch(revision=COMMIT) == path and server.requests == 0


class Stop(Exception):
    """What a host raises to interrupt."""


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt, OSError])
def test_an_interruption_passes_through_and_leaves_only_the_part(fetch, tmp_path, kind):
    def stop(done, total):
        raise kind("stop")

    with pytest.raises(kind, match=r"^stop$"):
        fetch(progress=stop)
    assert all(name.endswith(".part") for name in files(tmp_path))
    assert fetch().read_bytes() == BODY


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_file_is_resumed_by_a_later_call(fetch, server, monkeypatch, ranges):
    for module in ("constants", "file_download"):  # the latter before 0.26
        name = f"huggingface_hub.{module}.DOWNLOAD_CHUNK_SIZE"
        monkeypatch.setattr(name, 10_000, raising=False)

    def stop(done, total):
        if done >= 20_000:
            raise Stop

    with pytest.raises(Stop):
        fetch(progress=stop)
    server.ranges = ranges
    try:
        path = fetch()
    except RetrievalError:  # huggingface_hub before 0.36 appends the whole file
        assert not ranges
        path = fetch()
    assert path.read_bytes() == BODY
    assert server.asked[1][0] == "bytes=20000-"


def test_a_broken_connection_leaves_nothing_of_the_final_name(fetch, server, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    server.break_after = 25_000
    assert "broke off" in sentence(fetch)
    assert all(name.endswith(".part") for name in files(tmp_path))
    server.break_after = None
    assert fetch().read_bytes() == BODY


def test_what_is_not_safetensors_is_refused_and_removed(fetch, server, tmp_path):
    server.files[FILE] = b"<html>not a model</html>" * 9
    assert "not a whole safetensors file" in sentence(fetch)
    assert files(tmp_path) == []


def test_the_token_goes_to_the_hub_and_not_to_its_storage(fetch, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    storage = FakeHub(REPO, server.files)
    server.storage = storage.url
    assert fetch().read_bytes() == BODY
    assert server.asked == [(None, "Bearer hf_secret")] and storage.asked == [(None, None)]
    storage.close()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((403, "GatedRepo"), "is gated: accept its terms"),
        ((404, "RepoNotFound"), "no repository for 'face.safetensors' of 'someone/network'"),
        ((404, "RevisionNotFound"), "no such revision for 'face.safetensors' of 'someone/network'"),
        ((500, ""), "could not be reached"),
    ],
)
def test_refusals_are_one_sentence(fetch, server, answer, words):
    server.answer = answer
    assert words in sentence(fetch, revision="v1")


def test_a_missing_file_and_a_missing_revision_are_said(fetch):
    assert "no file 'x.safetensors' of 'someone/network'" in sentence(fetch, "x.safetensors")
    assert "no such revision for" in sentence(fetch, revision="v2")


def test_a_gated_repository_that_describes_its_files_is_said(fetch, server):
    server.gated = True
    assert "is gated" in sentence(fetch)


def test_without_a_network_the_file_that_is_here_serves(fetch):
    path = fetch()
    assert fetch(endpoint=NOBODY) == path
    for revision, name in (("v1", FILE), (None, "x.safetensors")):
        message = sentence(fetch, name, revision, endpoint=NOBODY)
        assert "could not be reached" in message and "refused" in message


def test_a_refusal_is_not_taken_for_a_missing_network(fetch, server):
    fetch()
    server.answer = (404, "RepoNotFound")
    assert "no repository" in sentence(fetch)


@pytest.mark.parametrize(
    "name",
    [
        "../face.safetensors",
        "a/../../face.safetensors",
        "/tmp/face.safetensors",
        "a//face.safetensors",
        "..\\face.safetensors",
        "C:face.safetensors",
        ".hidden.safetensors",
        "face\n.safetensors",
        "face.safetensors\n",
        "face.safetensors ",
        "face.ckpt",
        "face.safetensors.pt",
        "",
    ],
)
def test_unsafe_names_are_refused_before_any_request(fetch, server, tmp_path, name):
    assert "plain name of a safetensors file" in sentence(fetch, name)
    assert server.requests == 0 and files(tmp_path) == []


@pytest.mark.parametrize("repo", ["../x", "a/b/c", "", "a b", "https://huggingface.co/a/b"])
def test_a_repository_name_is_checked(fetch, server, repo):
    assert "write it as owner/name" in sentence(fetch, repo=repo)
    assert server.requests == 0


def test_a_link_out_of_the_folder_is_not_followed(fetch, tmp_path):
    outside = tmp_path.parent / f"{tmp_path.name}_outside"
    outside.mkdir()
    (tmp_path / "someone--network").mkdir()
    (tmp_path / "someone--network" / "sub").symlink_to(outside, target_is_directory=True)
    assert "outside" in sentence(fetch, "sub/face.safetensors")
    assert list(outside.iterdir()) == []


def test_a_full_disk_is_said_before_the_transfer(fetch, server, monkeypatch):
    usage = types.SimpleNamespace(total=1, used=1, free=10)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: usage)
    assert "No space left on device" in sentence(fetch)
    assert server.gets == []


def test_a_folder_that_cannot_be_made_is_said(fetch, tmp_path):
    (tmp_path / "someone--network").write_text("a file")
    assert "Could not write" in sentence(fetch)
