"""A running host and a page of it; collected only where there are a host and a Chromium."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chromium import open_page
from serving import running

from tests.conftest import find_comfyui

# For a person to look at.
SCREENSHOTS = Path(__file__).parent / "output"
# Errors that the host's own page logs in a fresh user folder.
_HOST_ERRORS = ("/user.css", "/userdata", "favicon.ico", "/settings/", "manifest")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with running(find_comfyui(), tmp_path_factory.mktemp("server")) as started:
        # No greeting over the page.
        started.post("/settings", {"Comfy.TutorialCompleted": True})
        yield started


@pytest.fixture(scope="session")
def host(server):
    """The host's version, for the names of screenshots."""
    return server.json("/system_stats")["system"]["comfyui_version"]


@pytest.fixture(scope="session")
def node_info(server):
    """What the server tells the page of every node."""
    return server.json("/object_info")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    with open_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


class HostPage:
    """ComfyUI's page, with an empty workflow."""

    def __init__(self, browser, server, host: str):
        self.browser, self.server, self.host = browser, server, host
        self.run, self.wait = browser.run, browser.wait

    def open(self, **settings) -> None:
        """Opens the page anew, in the classic canvas unless the settings say otherwise."""
        chosen = {"Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en", **settings}
        self.server.post("/settings", chosen)
        # What a page left unsaved in this browser is not asked for again.
        self.browser.call(
            "Storage.clearDataForOrigin", origin=self.server.address, storageTypes="all"
        )
        self.browser.go(self.server.address)
        self.wait(
            "window.comfyAPI?.app?.app?.graph && document.querySelector('[data-testid=\"queue-button\"],.comfyui-queue-button')"
        )
        self.run("globalThis.app = comfyAPI.app.app, 1")
        self.wait("LiteGraph.registered_node_types.RetrievalMap")
        self.browser.errors.clear()

    def load(self, workflow: dict) -> None:
        """Loads a workflow as dropping its file on the page does."""
        self.run(f"app.loadGraphData({json.dumps(workflow)}).then(() => 1)")
        self.settle()

    def settle(self) -> None:
        """Waits for two drawn frames."""
        frame = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self.run(f"{frame}.then(() => 1)")

    def errors(self) -> list[str]:
        """Console errors and uncaught exceptions since the page was opened."""
        self.run("1")
        return [e for e in self.browser.errors if not any(own in e for own in _HOST_ERRORS)]

    def show_all(self) -> None:
        """Fits the whole workflow into the window."""
        self.run(
            "app.canvas.fitViewToSelectionAnimated?.call, comfyAPI.app.app.canvas.ds.fitToBounds?.call, 1"
        )

    def screenshot(self, name: str) -> None:
        self.settle()
        self.browser.screenshot(SCREENSHOTS / f"{self.host} {name}.png")


@pytest.fixture
def page(browser, server, host):
    return HostPage(browser, server, host)


@pytest.fixture(params=[False, True], ids=["classic", "nodes2"])
def each_page(request, page):
    """The page in the classic canvas, and in Nodes 2.0."""
    page.open(**{"Comfy.VueNodes.Enabled": request.param})
    page.mode = request.node.callspec.id
    return page
