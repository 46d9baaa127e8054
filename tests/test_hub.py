"""Fetching a file from a hub, here one on the loopback."""

from __future__ import annotations

import hashlib
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import save

from retrieval_core import hub
from retrieval_core.errors import RetrievalError

COMMIT = "c" * 40
REPO = "someone/network"
FILE = "face.safetensors"
BODY = save({"w": torch.arange(250_000, dtype=torch.float32)}, {"format": "retrieval_controlnet"})


class Hub(ThreadingHTTPServer):
    """One repository; `break_after` bytes of each GET are sent, and every GET is recorded."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {FILE: BODY}
        self.break_after: int | None = None
        self.ranges = True
        self.etag: str | None = None
        self.storage: str | None = None
        self.answer: tuple[int, str] | None = None
        self.gets: list[tuple[str | None, str | None]] = []
        self.heads = 0
        self.renamed = False
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _body(self) -> bytes | None:
        *repo, resolve, revision, name = unquote(self.path).strip("/").split("/", 4)
        if self.server.renamed and "/".join(repo) == "someone/old":
            self.send_response(307)
            self.send_header("Location", self.path.replace("someone/old", REPO))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.server.answer:
            self._refuse(*self.server.answer)
        elif "/".join(repo) != REPO or resolve != "resolve":
            self._refuse(404, "RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif name not in self.server.files:
            self._refuse(404, "EntryNotFound")
        else:
            return self.server.files[name]
        return None

    def do_HEAD(self):
        self.server.heads += 1
        body = self._body()
        if body is None:
            return
        self.send_response(302 if self.server.storage else 200)
        if self.server.storage:
            self.send_header("Location", self.server.storage + self.path)
        etag = self.server.etag or hashlib.sha256(body).hexdigest()
        self.send_header("X-Linked-Etag", f'"{etag}"')
        self.send_header("X-Linked-Size", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0" if self.server.storage else str(len(body)))
        self.end_headers()

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.gets.append((wanted, self.headers.get("Authorization")))
        body = self._body()
        if body is None:
            return
        start = int(wanted.split("=")[1].rstrip("-")) if wanted and self.server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        stop = self.server.break_after
        self.wfile.write(body[start:] if stop is None else body[start : start + stop])
        self.close_connection = True


@pytest.fixture
def server():
    served = Hub()
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture
def fetch(server, tmp_path):
    def call(filename=FILE, revision=None, progress=None, repo=REPO):
        return hub.download(repo, filename, revision, tmp_path, progress, server.url)

    return call


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_file_arrives_whole_with_progress_and_is_not_fetched_again(fetch, server, tmp_path):
    seen = []
    path = fetch(progress=lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "someone--network" / FILE
    assert path.read_bytes() == BODY
    assert seen[0] == (0, len(BODY)) and seen[-1] == (len(BODY), len(BODY))
    assert fetch() == path and len(server.gets) == 1
    assert not [name for name in files(tmp_path) if name.endswith(".part")]


def test_a_changed_file_is_fetched_again(fetch, server):
    fetch()
    server.files[FILE] = save({"w": torch.ones(3)})
    assert fetch().read_bytes() == server.files[FILE] and len(server.gets) == 2


def test_a_renamed_repository_is_followed(fetch, server):
    server.renamed = True
    assert fetch(repo="someone/old").read_bytes() == BODY


def test_an_address_that_is_not_http_is_refused(fetch, server, tmp_path):
    server.storage = "file:///etc/passwd#"
    with pytest.raises(RetrievalError, match="kind 'file'"):
        fetch()
    assert files(tmp_path) == []


def test_a_pinned_commit_that_is_here_needs_no_network(fetch, server):
    path = fetch(revision=COMMIT)
    server.heads = 0
    assert fetch(revision=COMMIT) == path and server.heads == 0


def test_a_broken_connection_is_resumed_within_a_call(fetch, server):
    server.break_after = len(BODY) // 3 + 1
    assert fetch().read_bytes() == BODY
    assert [r for r, _ in server.gets] == [
        None,
        f"bytes={server.break_after}-",
        f"bytes={2 * server.break_after}-",
    ]


def test_an_unfinished_file_has_no_final_name_and_a_later_call_goes_on(fetch, server, tmp_path):
    server.break_after = 1000
    with pytest.raises(
        RetrievalError, match=r"broke off after .* run again to go on from there\.$"
    ):
        fetch()
    assert [n for n in files(tmp_path) if n.endswith(FILE)] == []
    server.break_after = None
    server.gets.clear()
    assert fetch().read_bytes() == BODY
    assert server.gets[0][0] == "bytes=4000-"  # four attempts of 1000 bytes each


def test_an_interruption_passes_through_and_leaves_only_the_part(fetch, server, tmp_path):
    class InterruptedError_(Exception):
        pass

    def stop(done, total):
        if done:
            raise InterruptedError_

    with pytest.raises(InterruptedError_):
        fetch(progress=stop)
    assert [n for n in files(tmp_path) if not n.endswith(".part")] == []
    assert fetch().read_bytes() == BODY


def test_a_server_without_ranges_sends_it_anew(fetch, server):
    server.break_after = 1000
    with pytest.raises(RetrievalError):
        fetch()
    server.break_after, server.ranges = None, False
    assert fetch().read_bytes() == BODY


def test_wrong_bytes_are_refused_and_removed(fetch, server, tmp_path):
    server.etag = "0" * 64
    with pytest.raises(RetrievalError, match="checksum is another"):
        fetch()
    assert files(tmp_path) == []
    server.etag, server.files[FILE] = "0" * 40, b"<html>not a model</html>" * 9
    with pytest.raises(RetrievalError, match="not a whole safetensors file"):
        fetch()
    assert files(tmp_path) == []


def test_the_token_goes_to_the_hub_and_not_to_its_storage(fetch, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch()
    assert server.gets[-1][1] == "Bearer hf_secret"
    storage = Hub()
    server.storage, server.files[FILE] = storage.url, save({"w": torch.zeros(5)})
    storage.files[FILE] = server.files[FILE]
    assert fetch().read_bytes() == storage.files[FILE]
    assert storage.gets == [(None, None)]
    storage.shutdown()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((403, "GatedRepo"), "is gated: accept its terms"),
        ((401, "RepoNotFound"), "no repository 'someone/network'"),
        ((404, "RevisionNotFound"), "no revision 'v1'"),
        ((404, "EntryNotFound"), "no file 'face.safetensors' of 'someone/network' at 'v1'"),
        ((500, ""), "could not be reached"),
    ],
)
def test_refusals_are_one_sentence(fetch, server, answer, words):
    server.answer = answer
    with pytest.raises(RetrievalError, match=words) as caught:
        fetch(revision="v1")
    one_sentence(str(caught.value))


def test_without_a_network_the_file_that_is_here_serves(fetch, tmp_path):
    path = fetch()
    nobody = "http://127.0.0.1:9"  # the discard port: nothing listens there
    assert hub.download(REPO, FILE, None, tmp_path, endpoint=nobody) == path
    for revision, name in (("v1", FILE), (None, "other.safetensors")):
        with pytest.raises(RetrievalError, match="could not be reached") as caught:
            hub.download(REPO, name, revision, tmp_path, endpoint=nobody)
        one_sentence(str(caught.value))


@pytest.mark.parametrize(
    "name",
    [
        "../face.safetensors",
        "a/../../face.safetensors",
        "/tmp/face.safetensors",
        "..\\face.safetensors",
        "C:face.safetensors",
        ".hidden.safetensors",
        "face\n.safetensors",
        "face.safetensors ",
        "face.ckpt",
        "face.safetensors.pt",
        "",
    ],
)
def test_unsafe_names_are_refused_before_any_request(fetch, server, tmp_path, name):
    with pytest.raises(RetrievalError) as caught:
        fetch(name)
    one_sentence(str(caught.value))
    assert server.heads == 0 and files(tmp_path) == []


@pytest.mark.parametrize("repo", ["../x", "a/b/c", "", "a b", "https://huggingface.co/a/b"])
def test_a_repository_name_is_checked(fetch, server, repo):
    with pytest.raises(RetrievalError, match="write it as owner/name"):
        fetch(repo=repo)
    assert server.heads == 0


def test_a_link_out_of_the_folder_is_not_followed(fetch, tmp_path):
    outside = tmp_path.parent / f"{tmp_path.name}_outside"
    outside.mkdir()
    (tmp_path / "someone--network").mkdir()
    (tmp_path / "someone--network" / "sub").symlink_to(outside, target_is_directory=True)
    with pytest.raises(RetrievalError, match="outside"):
        fetch("sub/face.safetensors")
    assert list(outside.iterdir()) == []


def test_a_full_disk_is_said_before_the_transfer(fetch, server, monkeypatch):
    usage = types.SimpleNamespace(total=1, used=1, free=10)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RetrievalError, match=r"needs 1\.0 MB and .* has 0\.0 MB left"):
        fetch()
    assert server.gets == []


def one_sentence(text: str) -> None:
    assert "\n" not in text and text.endswith(".") and len(text) < 400
