"""A real ComfyUI server with the pack installed, in folders of its own."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from published import list_published

PACK = Path(__file__).resolve().parents[2]
NAME = "retrieval-controlnet"
WEIGHTS = Path("retrieval_core", "paperdoll", "weights")
# Runs main.py, and ends when the pipe to the tests breaks, even if those were killed.
RUN = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True).start()
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
if os.environ.get("RETRIEVAL_LAZY_LAYERS"):
    import comfy.options
    comfy.options.enable_args_parsing()
    import comfy.memory_management
    comfy.memory_management.aimdo_enabled = True
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PATIENCE = 600.0


class Server:
    """Requests to the server, as its frontend makes them."""

    def __init__(self, port: int, process: subprocess.Popen, log: Path):
        self.address, self.process, self.log = f"http://127.0.0.1:{port}", process, log

    def get(self, path: str, **query: str) -> bytes:
        where = f"{self.address}{path}" + ("?" + urllib.parse.urlencode(query) if query else "")
        with urllib.request.urlopen(where, timeout=PATIENCE) as answer:
            return answer.read()

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post(self, path: str, value: Any) -> tuple[int, Any]:
        """Status and answer."""
        request = urllib.request.Request(
            self.address + path, json.dumps(value).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                status, body = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read()
        return status, json.loads(body) if body else None

    def queue(self, prompt: dict) -> str:
        """The id of a prompt that the server took."""
        status, answer = self.post("/prompt", {"prompt": prompt})
        assert status == 200, answer
        return answer["prompt_id"]

    def finished(self, prompt_id: str) -> dict | None:
        """A prompt's entry in the history, None while it is not done."""
        return self.json(f"/history/{prompt_id}").get(prompt_id)

    def run(self, prompt: dict) -> dict:
        """Waits for a prompt's entry in the history."""
        prompt_id = self.queue(prompt)
        return self.wait(lambda: self.finished(prompt_id))

    def wait(self, ready: Any) -> Any:
        """The first true answer of a function; AssertionError with the log if none comes."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            answer = ready()
            if answer:
                return answer
            time.sleep(0.1)
        raise AssertionError("the server gave no answer:\n" + self.tail())

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            self.get("/system_stats")
            return True
        return False

    def images(self, entry: dict, node: str) -> np.ndarray:
        """The pictures [N, H, W, 3] that a node of a finished prompt saved or showed."""
        files = entry["outputs"][node]["images"]
        opened = (Image.open(io.BytesIO(self.get("/view", **file))) for file in files)
        return np.stack([np.asarray(image.convert("RGB")) for image in opened])

    def tail(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-6000:]


def messages(entry: dict, kind: str) -> list[dict]:
    """What the server told of a finished prompt, by kind (execution_cached, execution_error)."""
    return [value for name, value in entry["status"]["messages"] if name == kind]


def with_inputs(prompt: dict, node: str, **inputs: Any) -> dict:
    """A copy of a prompt with other inputs of one node."""
    changed = copy.deepcopy(prompt)
    changed[node]["inputs"].update(inputs)
    return changed


def install(base: Path) -> Path:
    """The pack as it is published in base/custom_nodes, with weights of noise where it has none."""
    place = base / "custom_nodes" / NAME
    for name in list_published():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACK / name, place / name)
    if not has_weights():
        from making import paperdoll_bundle  # imports the host

        paperdoll_bundle(place / WEIGHTS)
    return place


def has_weights() -> bool:
    return len(list((PACK / WEIGHTS).glob("*.safetensors"))) == 3


@contextlib.contextmanager
def running(comfyui: Path, base: Path) -> Iterator[Server]:
    """The host's server, on the device of the tests; everything it writes lies in `base`."""
    install(base)
    for name in ("input", "output", "temp", "user", "models"):
        (base / name).mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = base / "server.log"
    folders = [
        ("--base-directory", base),
        ("--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}"),
    ]
    line = [sys.executable, "-c", RUN, comfyui / "main.py", "--port", port]
    line += [] if os.environ.get("RETRIEVAL_ON_GPU") else ["--cpu"]
    line += ["--disable-api-nodes", *(part for pair in folders for part in pair)]
    with log.open("wb") as written:
        process = subprocess.Popen(
            [str(part) for part in line],
            stdin=subprocess.PIPE,
            stdout=written,
            stderr=subprocess.STDOUT,
            cwd=comfyui,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        )
        try:
            server = Server(port, process, log)
            server.wait(server.answers)
            yield server
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
