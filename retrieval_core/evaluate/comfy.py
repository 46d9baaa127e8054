"""Client of a running ComfyUI's HTTP API (/upload/image, /prompt, /history, /view)."""

from __future__ import annotations

import hashlib
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.prepare import LARGEST_IMAGE
from ..errors import RetrievalError
from ..sheets import convert_to_pil
from .characters import Character
from .protocol import Run
from .workflow import Workflow

SERVER = "http://127.0.0.1:8188"
_POLL = (0.05, 1.0)  # seconds between two requests, growing from the first to the second
_ANSWER_LIMIT = 256 << 20


class Client:
    """The HTTP API of one server.

    Args:
        address: such as http://127.0.0.1:8188. timeout: seconds that one prompt may take.
    """

    def __init__(self, address: str = SERVER, timeout: float = 600.0):
        parts = urllib.parse.urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RetrievalError(f"'{address}' is no address of a ComfyUI; write it like {SERVER}.")
        self.address, self.timeout = address.rstrip("/"), timeout

    def upload(self, name: str, data: bytes) -> str:
        """Stores a PNG among the server's inputs and returns its name for Load Image."""
        boundary = uuid.uuid4().hex
        fields = {
            'name="overwrite"': b"true",
            'name="type"': b"input",
            'name="subfolder"': b"retrieval_evaluate",
            f'name="image"; filename="{name}"': data,
        }
        parts = (
            f"--{boundary}\r\nContent-Disposition: form-data; {field}\r\n\r\n".encode() + value
            for field, value in fields.items()
        )
        body = b"\r\n".join([*parts, f"--{boundary}--\r\n".encode()])
        kind = f"multipart/form-data; boundary={boundary}"
        stored = self._request_json("/upload/image", body, kind)
        folder, name = stored.get("subfolder") or "", stored.get("name") or name
        return f"{folder}/{name}" if folder else name

    def run(self, graph: Mapping[str, Any]) -> dict[str, Any]:
        """Queues a graph and waits for it; returns node id -> outputs.

        Raises:
            RetrievalError: the graph is refused, a node fails, the run is interrupted, or it takes
                longer than the timeout.
        """
        body = json.dumps({"prompt": graph, "client_id": uuid.uuid4().hex}).encode()
        queued = self._request_json("/prompt", body, "application/json")
        number = str(queued.get("prompt_id") or "")
        if not number:
            raise RetrievalError(
                f"{self.address} queued nothing ({str(queued)[:200]}); check that it is a ComfyUI."
            )
        pause, end = _POLL[0], time.monotonic() + self.timeout
        while time.monotonic() < end:
            entry = self._request_json(f"/history/{urllib.parse.quote(number)}").get(number)
            if entry is not None:
                return _read_outputs(entry)
            time.sleep(pause)
            pause = min(_POLL[1], pause * 1.5)
        raise RetrievalError(
            f"ComfyUI took longer than {self.timeout:g} seconds for one run; give more with "
            "--timeout, or look at its console."
        )

    def fetch_picture(self, image: Mapping[str, Any]) -> Tensor:
        """A picture [3, H, W] in 0..1 of an output's {filename, subfolder, type}."""
        query = {name: str(image.get(name, "")) for name in ("filename", "subfolder", "type")}
        return decode(self._request_bytes(f"/view?{urllib.parse.urlencode(query)}"))

    def _request_json(self, path: str, body: bytes | None = None, kind: str = "") -> dict[str, Any]:
        data = self._request_bytes(path, body, kind)
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise RetrievalError(
                f"{self.address}{path} did not answer as a ComfyUI does ({data[:80]!r}); check "
                "--server."
            )
        return found

    def _request_bytes(self, path: str, body: bytes | None = None, kind: str = "") -> bytes:
        headers = {"Content-Type": kind} if kind else {}
        request = urllib.request.Request(self.address + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=min(60.0, self.timeout)) as answer:
                return answer.read(_ANSWER_LIMIT)
        except urllib.error.HTTPError as error:
            with error:
                message = _explain_refusal(path, error.code, error.read(1 << 20))
                raise RetrievalError(message) from error
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise RetrievalError(
                f"No ComfyUI answers at {self.address} ({reason}); start it, and the same command "
                "again: it goes on from here."
            ) from error


class ComfyMethod:
    """Any workflow of a running ComfyUI as a method of the protocol.

    If the workflow has no slot for the number of samples, each sample is a separate run.
    """

    batch = 1

    def __init__(
        self, name: str, workflow: Workflow, client: Client, weights: Sequence[float] = ()
    ):
        self.name, self.workflow, self.client = name, workflow, client
        weights = weights if "strength" in workflow.slots else ()
        self.weights: Sequence[float | None] = weights or (None,)
        self.digest = workflow.digest()
        self._uploaded: dict[tuple[str, int], str] = {}

    def draw(
        self, runs: Sequence[Run], characters: Mapping[str, Character], weight: float | None
    ) -> list[Tensor]:
        return [self._draw(run, characters[run.character], weight) for run in runs]

    def _draw(self, run: Run, character: Character, weight: float | None) -> Tensor:
        values: dict[str, Any] = {"prompt": run.prompt}
        if weight is not None:
            values["strength"] = weight
        if self.workflow.references > len(character.references):
            raise RetrievalError(
                f"'{self.workflow.name}' takes {self.workflow.references} references and "
                f"'{character.name}' has {len(character.references)}; ask for more with "
                "--references."
            )
        for number in range(1, self.workflow.references + 1):
            values[f"reference{number}"] = self._upload(character, number - 1)
        if "samples" in self.workflow.slots:
            found = self._fetch_pictures({**values, "seed": run.seed, "samples": run.samples})
        else:
            seeds = [run.seed * 1000 + sample for sample in range(run.samples)]
            found = [p for seed in seeds for p in self._fetch_pictures({**values, "seed": seed})]
        if len(found) != run.samples:
            raise RetrievalError(
                f"'{self.workflow.name}' gave {len(found)} pictures where {run.samples} were asked "
                "for; mark the node that shows them with {pictures}, and the batch size with "
                "{samples}."
            )
        if len({picture.shape for picture in found}) > 1:
            raise RetrievalError(f"'{self.workflow.name}' gave pictures of different sizes.")
        return torch.stack(found)

    def _fetch_pictures(self, values: Mapping[str, Any]) -> list[Tensor]:
        outputs = self.client.run(self.workflow.fill(values))
        if "pictures" in self.workflow.slots:
            node, _ = self.workflow.slots["pictures"]
            outputs = {node: outputs.get(node, {})}
        images = [image for node in outputs.values() for image in node.get("images", [])]
        saved = [image for image in images if image.get("type") == "output"]
        return [self.client.fetch_picture(image) for image in saved or images]

    def _upload(self, character: Character, index: int) -> str:
        key = (character.name, index)
        if key not in self._uploaded:
            data = encode(character.references[index].image)
            name = f"{hashlib.sha256(data).hexdigest()[:24]}.png"
            self._uploaded[key] = self.client.upload(name, data)
        return self._uploaded[key]


def encode(picture: Tensor) -> bytes:
    """A picture [3, H, W] in 0..1 as the bytes of a PNG."""
    file = io.BytesIO()
    convert_to_pil(picture).save(file, "PNG")
    return file.getvalue()


def decode(data: bytes) -> Tensor:
    """The bytes of an image file as [3, H, W] in 0..1; RetrievalError if they are none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > LARGEST_IMAGE:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise a dozen classes on damaged data
        raise RetrievalError(
            f"What ComfyUI showed is no picture ({error}); look at the workflow's output."
        ) from error
    return torch.from_numpy(pixels.copy()).movedim(-1, 0).float() / 255


def _read_outputs(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of a finished run; RetrievalError if it failed or was interrupted."""
    status = entry.get("status") or {}
    for kind, about in status.get("messages") or []:
        if kind == "execution_error":
            message = " ".join(str(about.get("exception_message", "")).split())[:300].rstrip(".")
            raise RetrievalError(
                f"Node {about.get('node_id')} ({about.get('node_type')}) failed in ComfyUI: "
                f"{message}; mend the workflow and start again."
            )
        if kind == "execution_interrupted":
            raise RetrievalError(
                "The run was interrupted in ComfyUI; start the same command again to go on."
            )
    return dict(entry.get("outputs") or {})


def _explain_refusal(path: str, code: int, body: bytes) -> str:
    """One sentence on an HTTP error, with ComfyUI's message about the graph."""
    said = ""
    try:
        answer = json.loads(body)
        said = str(answer["error"]["message"])
        for node, errors in (answer.get("node_errors") or {}).items():
            first = errors["errors"][0]
            said += f"; node {node} ({errors.get('class_type')}): {first['message']}"
            said += f" ({first['details']})" if first.get("details") else ""
            break
    except (ValueError, KeyError, TypeError, IndexError):
        said = said or body[:120].decode(errors="replace")
    said = " ".join(said.split()).rstrip(".")
    return f"ComfyUI refused {path.split('?')[0]} with status {code} ({said}); mend the workflow."
