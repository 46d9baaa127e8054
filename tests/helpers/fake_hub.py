"""A hub with one repository, for plumbing: what huggingface_hub asks of it to fetch a model."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


class FakeHub(ThreadingHTTPServer):
    """`files` (path -> bytes) of the repository `name`; `gets` are the files that were sent.

    answer: (status, X-Error-Code) for every request. missing: files that are listed but not sent.
    """

    daemon_threads = True

    def __init__(self, name: str, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.files = name, files
        self.answer: tuple[int, str] | None = None
        self.missing: set[str] = set()
        self.gets: list[str] = []
        self.requests = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

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
        if path == f"api/models/{hub.name}":
            files = [{"rfilename": n, "size": len(b)} for n, b in hub.files.items()]
            told = {"id": hub.name, "modelId": hub.name, "sha": COMMIT, "siblings": files}
            return self._reply(200, json.dumps(told).encode(), {}, whole)
        name = path.removeprefix(f"{hub.name}/resolve/main/")
        if not path.startswith("api/") and name in hub.files and name not in hub.missing:
            body = hub.files[name]
            if whole:
                hub.gets.append(name)
            etag = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self._reply(200, body, etag, whole)
        code = "EntryNotFound" if path.startswith(hub.name) else "RepoNotFound"
        self._reply(404, b"{}", {"X-Error-Code": code}, whole)

    def _reply(self, status: int, body: bytes, headers: dict[str, str], whole: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if whole:
            self.wfile.write(body)
