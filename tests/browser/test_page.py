"""The pack in the host's page: nodes, workflows, a run, saved values, help and translations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from serving import NAME, PACK, has_weights
from workflows import FOLDER, example

WORKFLOWS = sorted(path.stem for path in FOLDER.glob("*.json"))
BLUEPRINTS = sorted((PACK / "subgraphs").glob("*.json"))
LOCALES = sorted(path.parent.name for path in (PACK / "locales").glob("*/nodeDefs.json"))
# Values of all our nodes, by title, as they would be saved and as they would be queued.
SAVED = """Object.fromEntries(app.graph.serialize().nodes.map((node) =>
[node.id, node.widgets_values ?? []]))"""
# A list without files has no value, which is queued as none or as null.
QUEUED = """app.graphToPrompt().then(({ output }) =>
JSON.parse(JSON.stringify(output, (_, value) => value ?? undefined)))"""


def own(node_info: dict) -> list[str]:
    return [name for name in node_info if name.startswith("Retrieval")]


def add(page, names: list[str]) -> None:
    page.run(
        f"""{json.dumps(names)}.forEach((name, i) => {{
            const node = LiteGraph.createNode(name);
            node.pos = [(i % 5) * 460, Math.floor(i / 5) * 640];
            app.graph.add(node);
        }}), 1"""
    )
    page.settle()


def bring_files(base: Path, workflow: dict) -> None:
    """Puts the models and pictures that a user has to bring in the server's folders, empty ones."""
    for node in workflow["nodes"]:
        for model in node.get("properties", {}).get("models", []):
            path = base / "models" / model["directory"] / model["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        if node["type"] == "LoadImage":
            Image.new("RGB", (64, 64), "teal").save(base / "input" / node["widgets_values"][0])


def missing(page) -> list[str]:
    """Types of nodes, also within subgraphs, that the page does not know."""
    return page.run(
        """[app.graph, ...(app.graph.subgraphs?.values() ?? [])].flatMap((graph) => graph.nodes)
        .filter((node) => !node.isSubgraphNode?.() &&
            !(node.type in LiteGraph.registered_node_types)).map((node) => node.type)"""
    )


def test_the_page_waits_for_one_file_of_ours(page):
    """And for none of the host's scripts; styles, help and pictures come with the nodes."""
    page.open()
    ours = f"{page.server.address}/extensions/{NAME}/"

    def requested() -> list[str]:
        asked = page.browser.requests
        return [url for url in asked if url.startswith(ours) or "/scripts/" in url]

    assert requested() == [f"{ours}retrieval.js"]
    add(page, ["RetrievalMap"])
    page.wait("document.getElementById('retrieval-style').sheet")
    assert requested() == [f"{ours}retrieval.js", f"{ours}retrieval.css"]


def test_every_node_can_be_added(any_page, node_info):
    add(any_page, own(node_info))
    any_page.screenshot("all nodes")
    assert any_page.run("app.graph.nodes.length") == len(own(node_info))
    assert any_page.errors() == []


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_workflow_loads(page, canvas, name):
    bring_files(page.server.log.parent, example(name))
    page.open_in(canvas)
    page.load(example(name))
    page.screenshot(name)
    assert page.run("app.graph.nodes.length") == len(example(name)["nodes"])
    assert missing(page) == [] and page.errors() == []


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_every_blueprint_loads(any_page, path):
    any_page.load(json.loads(path.read_text(encoding="utf-8")))
    any_page.screenshot(path.stem)
    assert any_page.run("app.graph.nodes.length") == 1
    assert missing(any_page) == [] and any_page.errors() == []


@pytest.mark.skipif(not has_weights(), reason="retrieval_core/paperdoll/weights has no files yet")
def test_the_run_button_gives_a_picture(any_page):
    workflow = example("Demo - Same character")
    any_page.load(workflow)
    saver = next(n["id"] for n in workflow["nodes"] if n["type"] == "SaveImage")
    shown = any_page.click_run(saver)["images"]
    assert len(shown) == 4
    for file in shown:
        size = any_page.run(
            f"""new Promise((done) => {{
                const image = new Image();
                image.onload = () => done([image.naturalWidth, image.naturalHeight]);
                image.onerror = () => done(null);
                image.src = comfyAPI.api.api.apiURL("/view?" + new URLSearchParams(
                    {json.dumps(file)}));
            }})"""
        )
        assert size == [256, 256]
    any_page.screenshot("run")
    assert any_page.errors() == []


def test_values_survive_save_and_reload(any_page, node_info):
    """Also those of fields that only a choice shows, and none is saved for what is drawn."""
    add(any_page, own(node_info))
    any_page.run(
        """app.graph.nodes.forEach((node) => node.widgets?.forEach((widget) => {
            if (widget.serialize === false) return;
            if (Array.isArray(widget.options?.values)) widget.value = widget.options.values.at(-1);
            else if (typeof widget.value === "boolean") widget.value = !widget.value;
            else if (widget.type === "number") widget.value = widget.options.max ?? 1;
            else if (typeof widget.value === "string") widget.value = "0.5, 1";
            widget.callback?.(widget.value);
        })), 1"""
    )
    any_page.settle()
    before, queued = any_page.run(SAVED), any_page.run(QUEUED)
    drawn = any_page.run(
        """app.graph.nodes.filter((node) => node.widgets?.some((widget) =>
        widget.name.startsWith("drawn_"))).length"""
    )
    assert drawn == 5
    for node in queued.values():
        assert not any(name.startswith("drawn_") for name in node["inputs"])
    workflow = json.loads(any_page.run("JSON.stringify(app.graph.serialize())"))
    any_page.browser.go(any_page.server.address + "/?again")
    any_page.wait_ready()
    any_page.load(workflow)
    assert any_page.run(SAVED) == before
    assert any_page.run(QUEUED) == queued


def check_help(page, name: str, path: Path) -> None:
    """Opens the help of a node, the only one, and waits for a page's title and first words."""
    lines = path.read_text(encoding="utf-8").splitlines()
    title, words = lines[0].lstrip("# "), lines[2].split("*")[0][:20].strip()
    page.run("app.graph.clear(), 1")
    add(page, [name])
    page.run("app.canvas.selectNode(app.graph.nodes[0]), 1")
    page.fit()
    info = "document.querySelector('[data-testid=\"info-button\"]')"
    page.wait(info)
    page.browser.click(*page.middle(info))
    page.wait(
        "[...document.querySelectorAll('h1')].some((heading) => "
        f"heading.innerText.trim() === {json.dumps(title)} && "
        f"heading.parentElement.innerText.includes({json.dumps(words)}))"
    )


def test_the_help_of_every_node_is_shown(page, node_info):
    page.open()
    for name in own(node_info):
        check_help(page, name, PACK / "web/docs" / f"{name}.md")
    page.screenshot("help")
    assert page.errors() == []


@pytest.mark.parametrize("locale", LOCALES)
def test_titles_and_what_is_drawn_are_translated(page, node_info, locale):
    page.open(**{"Comfy.Locale": locale})
    add(page, own(node_info))
    page.screenshot(f"locale {locale}")
    told = json.loads((PACK / "locales" / locale / "nodeDefs.json").read_text(encoding="utf-8"))
    titles = page.run("Object.fromEntries(app.graph.nodes.map((n) => [n.comfyClass, n.title]))")
    for name in own(node_info):
        assert titles[name] == told[name]["display_name"]
    drawn = page.run(
        """app.graph.nodes.find((node) => node.comfyClass === "RetrievalApplyReferences").widgets
            .find((widget) => widget.name === "drawn_curve").element.textContent"""
    )
    assert told["RetrievalApplyReferences"]["inputs"]["strength"]["name"] in drawn


def test_a_tooltip_and_a_help_page_are_translated(page):
    name = "RetrievalApplyReferences"
    page.open(**{"Comfy.Locale": "ja"})
    add(page, [name])
    page.fit()
    left, top = page.run("(({ x, y }) => [x, y])(app.canvas.canvas.getBoundingClientRect())")
    x, y = page.run("app.canvas.ds.convertOffsetToCanvas(app.graph.nodes[0].getInputPos(0))")
    page.browser.move(left + x, top + y)
    told = json.loads((PACK / "locales/ja/nodeDefs.json").read_text(encoding="utf-8"))
    tooltip = told[name]["inputs"]["model"]["tooltip"]
    page.wait(
        f"document.querySelector('.node-tooltip')?.innerText.trim() === {json.dumps(tooltip)}"
    )
    check_help(page, name, PACK / "web/docs" / name / "ja.md")
    page.screenshot("help ja")
