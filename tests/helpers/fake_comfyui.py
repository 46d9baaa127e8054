"""ComfyUI's HTTP API in little, for plumbing; the real one is asked in tests/host."""

from __future__ import annotations

import email
import email.policy
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeComfyUI:
    """Answers /upload/image, /prompt, /history and /view.

    `execute(graph, uploads)` gives {node: [PNG bytes, ...]}, or a dict that is the whole entry of
    the history. refusal: the body with which /prompt is refused with status 400.
    """

    def __init__(self, execute, refusal=None):
        self.execute, self.refusal = execute, refusal
        self.uploads: dict[str, bytes] = {}
        self.prompts: list[dict] = []
        self.entries: dict[str, dict] = {}
        self.pictures: dict[str, bytes] = {}
        self.looks = 0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/upload/image":
                    return self._json(200, fake.store(self.headers["Content-Type"], body))
                if self.path == "/prompt":
                    return self._json(*fake.queue(json.loads(body)))
                self._json(404, {})

            def do_GET(self):
                url = urllib.parse.urlsplit(self.path)
                query = dict(urllib.parse.parse_qsl(url.query))
                if url.path.startswith("/history/"):
                    return self._json(200, fake.history(url.path.rsplit("/", 1)[1]))
                if url.path == "/view":
                    self.send_response(200)
                    self.end_headers()
                    return self.wfile.write(fake.pictures[query["filename"]])
                self._json(404, {})

            def _json(self, status, value):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(value).encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def store(self, kind: str, body: bytes) -> dict:
        head = f"Content-Type: {kind}\r\n\r\n".encode()
        message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
        fields = {part.get_param("name", header="content-disposition"): part
                  for part in message.iter_parts()}  # fmt: skip
        folder = fields["subfolder"].get_content().strip()
        name = fields["image"].get_filename()
        self.uploads[f"{folder}/{name}"] = fields["image"].get_payload(decode=True)
        return {"name": name, "subfolder": folder, "type": "input"}

    def queue(self, asked: dict) -> tuple[int, dict]:
        if self.refusal is not None:
            return 400, self.refusal
        number = f"run-{len(self.prompts)}"
        self.prompts.append(asked["prompt"])
        made = self.execute(asked["prompt"], self.uploads)
        if "status" in made:
            self.entries[number] = made
        else:
            outputs = {}
            for node, pictures in made.items():
                names = [f"{number}_{node}_{i}.png" for i in range(len(pictures))]
                self.pictures |= dict(zip(names, pictures))
                outputs[node] = {
                    "images": [{"filename": n, "subfolder": "", "type": "output"} for n in names]
                }
            status = {"status_str": "success", "completed": True, "messages": []}
            self.entries[number] = {"outputs": outputs, "status": status}
        return 200, {"prompt_id": number, "number": 0, "node_errors": {}}

    def history(self, number: str) -> dict:
        self.looks += 1
        if self.looks % 2:  # the first look always comes too early
            return {}
        return {number: self.entries[number]}
