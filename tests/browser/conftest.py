"""A running host and a page of it; collected only where there are a host and a Chromium."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chromium import Page, open_page
from serving import Server, running

from tests.conftest import find_comfyui

# For a person to look at.
SCREENSHOTS = Path(__file__).parent / "output"
# What the host's page logs itself: files that a fresh user folder has not, models of its default
# workflow, a help page's translation before the page itself, and that a test left unsaved changes.
_HOST_ERRORS = (
    "/user.css",
    "/userdata",
    "/favicon.ico",
    "graph accessed before initialization",
    "/missingModelMetadata",
    "/en.md",
    "'beforeunload'",
)
_READY = """window.comfyAPI?.app?.app?.canvas?.graph &&
LiteGraph.registered_node_types.RetrievalMap &&
document.querySelector(".queue-button-group button")"""
_FRAMES = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"


class HostPage:
    """ComfyUI's page, with an empty workflow; the host's `app` is there for scripts."""

    def __init__(self, browser: Page, server: Server, host: str):
        self.browser, self.server, self.host = browser, server, host
        self.run, self.wait = browser.run, browser.wait

    def open(self, **settings: Any) -> None:
        """Opens the page anew, by default in English and in the classic canvas."""
        chosen = {"Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en", **settings}
        self.server.post("/settings", chosen)
        self.browser.errors.clear()
        self.browser.requests.clear()
        self.browser.go(self.server.address)
        self.wait_ready()
        self.run("app.graph.clear(), 1")

    def open_in(self, canvas: str) -> None:
        """Opens the page anew in the "classic" canvas or in "nodes 2.0"; screenshots tell which."""
        self.open(**{"Comfy.VueNodes.Enabled": canvas == "nodes 2.0"})
        self.host += f" {canvas}"

    def wait_ready(self) -> None:
        self.wait(_READY)
        self.run("globalThis.app = comfyAPI.app.app, 1")

    def load(self, workflow: dict) -> None:
        """Loads a workflow as dropping its file on the page does."""
        self.run(f"app.loadGraphData({json.dumps(workflow)}).then(() => 1)")
        self.settle()

    def settle(self) -> None:
        """Waits for two drawn frames."""
        self.run(_FRAMES)

    def click_run(self, node: int | str) -> Any:
        """Clicks on the page's Run button and gives the output of a node."""
        button = (
            "[...document.querySelectorAll('button')].find((b) => b.innerText.trim() === 'Run')"
        )
        self.run("app.nodeOutputs = {}, 1")
        self.browser.click(*self.middle(button))
        self.wait(f"app.nodeOutputs['{node}']")
        self.settle()
        return self.run(f"app.nodeOutputs['{node}']")

    def middle(self, element: str) -> tuple[float, float]:
        """The middle of an element, an expression, on the screen."""
        box = f"(({element}).getBoundingClientRect())"
        script = f"[{box}.x + {box}.width / 2, {box}.y + {box}.height / 2]"
        x, y = self.run(script)
        return x, y

    def errors(self) -> list[str]:
        """Console errors and uncaught exceptions since the page was opened."""
        self.settle()
        return [e for e in self.browser.errors if not any(name in e for name in _HOST_ERRORS)]

    def fit(self) -> None:
        """Fits the whole workflow into the window, which is animated."""
        self.run("app.extensionManager.command.execute('Comfy.Canvas.FitView').then(() => 1)")
        self.run("new Promise((done) => setTimeout(() => done(1), 800))")

    def screenshot(self, name: str) -> None:
        """Keeps a picture of the page with the whole workflow in it."""
        self.fit()
        self.browser.screenshot(self.picture(name))

    def picture(self, name: str) -> Path:
        return SCREENSHOTS / f"{self.host} {name}.png"


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with running(find_comfyui(), tmp_path_factory.mktemp("server")) as started:
        # No greeting over the page.
        quiet = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
        # An earlier page's workflows are not opened again.
        started.post("/settings", {**quiet, "Comfy.Workflow.Persist": False})
        yield started


@pytest.fixture(scope="session")
def host(server):
    """The host's version, in the names of screenshots."""
    return server.json("/system_stats")["system"]["comfyui_version"]


@pytest.fixture(scope="session")
def node_info(server):
    """What the server tells the page of every node."""
    return server.json("/object_info")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    with open_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser, server, host):
    return HostPage(browser, server, host)


@pytest.fixture(params=["classic", "nodes 2.0"])
def canvas(request):
    return request.param


@pytest.fixture
def any_page(page, canvas):
    """The page opened in the classic canvas, and in Nodes 2.0."""
    page.open_in(canvas)
    return page
