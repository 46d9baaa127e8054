"""A hub with one repository on the loopback: answers what huggingface_hub asks to fetch files."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, file_download

COMMIT = "c" * 40
REVISIONS = ("main", "v1", COMMIT)


def use_endpoint(monkeypatch, url: str) -> None:
    """Points huggingface_hub at a hub, as HF_ENDPOINT does when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


class FakeHub(ThreadingHTTPServer):
    """`files` (path -> bytes) of the repository `name`, at any of `REVISIONS`.

    Attributes:
        answer: (status, X-Error-Code) for every request.
        missing: files that are listed but not sent.
        gated: whether files are refused; they are listed all the same.
        break_after: bytes that are sent before the connection closes.
        ranges: False: every answer is the whole file.
        storage: address that files are redirected to.
        gets: files that were sent. asked: the headers Range and Authorization of each.
        requests: how many there were.
    """

    daemon_threads = True

    def __init__(self, name: str, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.files = name, files
        self.answer: tuple[int, str] | None = None
        self.missing: set[str] = set()
        self.gated = False
        self.break_after: int | None = None
        self.ranges = True
        self.storage: str | None = None
        self.gets: list[str] = []
        self.asked: list[tuple[str | None, str | None]] = []
        self.requests = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_) -> None:
        """Clients may break off."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._send(False)

    def do_GET(self):
        self._send(True)

    def _send(self, whole: bool) -> None:
        hub = self.server
        hub.requests += 1
        path = unquote(urlsplit(self.path).path).strip("/")
        if hub.answer:
            return self._reply(hub.answer[0], b"{}", {"X-Error-Code": hub.answer[1]}, whole)
        if "renamed/repository" in path:
            to = self.path.replace("renamed/repository", hub.name)
            return self._reply(307, b"", {"Location": to}, whole)
        url, _, revision = path.partition("/revision/")
        if url == f"api/models/{hub.name}" and revision in ("", *REVISIONS):
            files = [
                {"rfilename": n, "size": len(b), "blobId": hashlib.sha1(b).hexdigest()}
                for n, b in hub.files.items()
            ]
            about = {"id": hub.name, "modelId": hub.name, "sha": COMMIT, "siblings": files}
            about |= {"private": False, "downloads": 0, "likes": 0, "tags": []}  # before 0.24
            return self._reply(200, json.dumps(about).encode(), {}, whole)
        repository, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        if hub.name not in (repository, url.removeprefix("api/models/")):
            return self._reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, whole)
        if revision not in REVISIONS:
            return self._reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, whole)
        if name not in hub.files or name in hub.missing:
            return self._reply(404, b"{}", {"X-Error-Code": "EntryNotFound"}, whole)
        if hub.gated:
            return self._reply(403, b"{}", {"X-Error-Code": "GatedRepo"}, whole)
        body = hub.files[name]
        headers = {
            "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
        }
        if whole:
            hub.gets.append(name)
            hub.asked.append((self.headers.get("Range"), self.headers.get("Authorization")))
        if hub.storage is not None:
            return self._reply(302, b"", headers | {"Location": hub.storage + self.path}, whole)
        wanted = self.headers.get("Range") if hub.ranges else None
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self._reply(206 if start else 200, body[start:], headers, whole, hub.break_after)

    def _reply(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str],
        whole: bool,
        break_after: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if whole:
            self.wfile.write(body[:break_after])
            self.close_connection = break_after is not None
