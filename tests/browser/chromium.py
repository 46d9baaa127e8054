"""A page in headless Chromium, driven by the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp  # of ComfyUI's requirements

from tests.conftest import CHROMIUM

SIZE = (1600, 1000)
PATIENCE = 120.0


class Page:
    """One page: scripts run in it, real mouse and keyboard events, and its errors.

    Attributes:
        errors: texts of console errors, uncaught exceptions and failed requests, as they come.
        requests: addresses that were asked for, as they come.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse):
        self.loop, self.socket = loop, socket
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._last = 0
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        width, height = SIZE
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def call(self, method: str, **parameters: Any) -> dict:
        """Sends a command and returns its result; events that come first are recorded."""
        self._last += 1
        sent = {"id": self._last, "method": method, "params": parameters}
        return self.loop.run_until_complete(self._exchange(sent))

    async def _exchange(self, sent: dict) -> dict:
        await self.socket.send_json(sent)
        while True:
            message = await self.socket.receive_json(timeout=PATIENCE)
            if message.get("id") == sent["id"]:
                assert "error" not in message, (sent["method"], message["error"])
                return message["result"]
            if message.get("method") == "Page.javascriptDialogOpening":
                await self._answer_dialog()
            self._record(message)

    async def _answer_dialog(self) -> None:
        """Leaves a page with unsaved changes, which asks before it goes."""
        self._last += 1
        command = {"method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
        await self.socket.send_json({"id": self._last, **command})

    def _record(self, event: dict) -> None:
        given = event.get("params", {})
        match event.get("method"):
            case "Runtime.consoleAPICalled" if given["type"] == "error":
                said = (arg.get("value") or arg.get("description", "") for arg in given["args"])
                self.errors.append(" ".join(map(str, said)))
            case "Runtime.exceptionThrown":
                details = given["exceptionDetails"]
                thrown = details.get("exception", {}).get("description")
                self.errors.append(thrown or details["text"])
            case "Log.entryAdded" if given["entry"]["level"] == "error":
                entry = given["entry"]
                self.errors.append(f"{entry['text']} {entry.get('url', '')}")
            case "Network.requestWillBeSent":
                self.requests.append(given["request"]["url"])

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, (script, answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, script: str, patience: float = PATIENCE) -> None:
        """Waits until an expression is true."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if self.run(f"Boolean({script})"):
                return
            time.sleep(0.1)
        raise AssertionError(f"never true: {script}\n" + "\n".join(self.errors))

    def go(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def move(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        self.move(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def open_page(profile: Path) -> Iterator[Page]:
    """A page of a new browser whose profile lies in the folder `profile`."""
    command = next(found for found in map(shutil.which, CHROMIUM) if found)
    line = [
        command,
        "--headless=new",
        "--no-sandbox",  # containers of CI run as root
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--lang=en-US",
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
        "about:blank",
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(line, **quiet)
    loop = asyncio.new_event_loop()
    try:
        with contextlib.closing(loop):
            session, socket = loop.run_until_complete(_connect(profile / "DevToolsActivePort"))
            try:
                yield Page(loop, socket)
            finally:
                loop.run_until_complete(session.close())
    finally:
        process.kill()
        process.wait()


async def _connect(port_file: Path) -> tuple[Any, Any]:
    """The session and the WebSocket of the browser's first page."""
    deadline = time.monotonic() + PATIENCE
    while not (port_file.is_file() and port_file.read_text()):
        assert time.monotonic() < deadline, "Chromium gave no port for DevTools"
        await asyncio.sleep(0.1)
    address = f"http://127.0.0.1:{port_file.read_text().split()[0]}/json/list"
    session = aiohttp.ClientSession()
    while True:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(address) as answer:
                listed = json.loads(await answer.text())
                pages = [target for target in listed if target["type"] == "page"]
                if pages:
                    url = pages[0]["webSocketDebuggerUrl"]
                    return session, await session.ws_connect(url, max_msg_size=0)
        assert time.monotonic() < deadline, "Chromium gave no page"
        await asyncio.sleep(0.1)
