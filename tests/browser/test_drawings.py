"""What web/ draws on nodes: thumbnails, strength curve and retrieval map."""

from __future__ import annotations

import base64
import itertools
import json

import numpy as np
import pytest
from PIL import Image
from serving import NAME, has_weights
from workflows import example

from retrieval_core.sampling.controls import CURVES, parse_curve
from retrieval_core.sampling.presets import PRESETS

needs_weights = pytest.mark.skipif(
    not has_weights(), reason="retrieval_core/paperdoll/weights has no files yet"
)
LOADER = "RetrievalControlNetLoader"
# A character of its own for each run: what the host has cached tells the page nothing.
_characters = itertools.count(100)

ADD_MAP = """(() => {
    const add = (type, x, y) => {
        const node = LiteGraph.createNode(type);
        node.pos = [x, y];
        app.graph.add(node);
        return node;
    };
    const find = (type) => app.graph.nodes.find((node) => node.comfyClass === type);
    const sampler = app.graph.nodes.find((node) => node.title === "With the references");
    const decode = app.graph.nodes.find((node) =>
        node.comfyClass === "VAEDecode" && node.getInputNode(0) === sampler);
    const record = add("RetrievalRecordMap", 780, 960);
    const map = add("RetrievalMap", 780, 1160);
    map.setSize([640, 620]);
    find("RetrievalApplyReferences").connect(0, record, 0);
    record.connect(0, sampler, 0);
    record.connect(1, map, 0);
    decode.connect(0, map, 1);
    return map.id;
})()"""


def load_demo(page) -> None:
    workflow = example("Demo - Same character")
    for node in workflow["nodes"]:
        if node["type"] == "RetrievalPaperdollReference":
            node["widgets_values"][0] = next(_characters)
    page.load(workflow)


def find(kind: str) -> str:
    """An expression for the one node of a class."""
    return f"app.graph.nodes.find((node) => node.comfyClass === '{kind}')"


def element(kind: str, drawn: str) -> str:
    """An expression for what is drawn on it."""
    return f"{find(kind)}.widgets.find((widget) => widget.name === '{drawn}').element"


def hover(page, kind: str, drawn: str) -> None:
    """Moves the pointer onto a node, which in the classic canvas brings what is drawn to life."""
    page.run("app.canvas.draw(true, true), 1")
    if page.run("!LiteGraph.vueNodesMode"):
        node = find(kind)
        x, y = page.run(
            f"app.canvas.ds.convertOffsetToCanvas([{node}.pos[0] + 9, {node}.pos[1] + 9])"
        )
        left, top = page.run("(({ x, y }) => [x, y])(app.canvas.canvas.getBoundingClientRect())")
        page.browser.move(left + x, top + y)
    page.wait(f"{element(kind, drawn)}.checkVisibility()", 20)


def set_value(page, kind: str, name: str, value) -> None:
    page.run(
        f"""(() => {{
            const widget = {find(kind)}.widgets.find((one) => one.name === "{name}");
            widget.value = {json.dumps(value)};
            widget.callback?.(widget.value);
            return 1;
        }})()"""
    )
    page.settle()


@needs_weights
def test_references_in_use_are_shown(any_page):
    load_demo(any_page)
    tiles = element("RetrievalEncodeReferences", "drawn_references")
    assert any_page.run(f"{tiles}.innerText") == ""
    set_value(any_page, "RetrievalEncodeReferences", "weight", 0.5)
    # Only the figure is encoded.
    any_page.run(
        f"{find('RetrievalPaperdollReference')}.connect(1, "
        f"{find('RetrievalEncodeReferences')}, 'mask'), 1"
    )
    encode = any_page.run(f"{find('RetrievalEncodeReferences')}.id")
    told = any_page.click_run(encode)["retrieval_references"]
    captions = any_page.run(f"[...{tiles}.querySelectorAll('figcaption')].map((c) => c.innerText)")
    assert len(told) == len(captions) == 4
    for one, caption in zip(told, captions):
        assert 0 < one["kept"] < 1
        kept = f"mask keeps {round(100 * one['kept'])} %"
        assert caption.split("\n") == ["figure", "weight 0.5", kept]
    any_page.wait(f"[...{tiles}.querySelectorAll('img')].every((image) => image.naturalWidth)")
    # The picture of the reference encoded last is not left on the node.
    assert not any_page.run(f"{find('RetrievalEncodeReferences')}.imgs?.length ?? 0")
    any_page.screenshot("references")
    assert any_page.errors() == []


@needs_weights
def test_a_workflow_whose_tab_is_opened_again_shows_its_references(page):
    page.open()
    load_demo(page)
    page.click_run(page.run(f"{find('RetrievalEncodeReferences')}.id"))
    for command in ("Comfy.NewBlankWorkflow", "Workspace.PreviousOpenedWorkflow"):
        page.run(f"app.extensionManager.command.execute('{command}').then(() => 1)")
        page.settle()
    page.wait(find("RetrievalEncodeReferences"))
    tiles = element("RetrievalEncodeReferences", "drawn_references")
    page.wait(f"{tiles}.querySelectorAll('figure').length === 4", 20)


@needs_weights
def test_a_picture_that_is_gone_is_said_to_be(page):
    page.open()
    load_demo(page)
    encode = page.run(f"{find('RetrievalEncodeReferences')}.id")
    told = page.click_run(encode)
    lost = told["retrieval_references"][1]["image"]["filename"]
    (page.server.log.parent / "temp" / lost).unlink()
    # As when the workflow's tab is opened again, past what the browser has in memory.
    page.browser.call("Network.clearBrowserCache")
    page.run(f"{find('RetrievalEncodeReferences')}.onExecuted({json.dumps(told)}), 1")
    tiles = element("RetrievalEncodeReferences", "drawn_references")
    page.wait(f"{tiles}.querySelectorAll('.gone').length")
    assert "gone from the temp folder" in page.run(f"{tiles}.querySelector('.gone').innerText")
    assert page.run(f"{tiles}.querySelectorAll('img').length") == 3


@needs_weights
def test_a_file_that_is_gone_from_the_library_is_said_to_be(page):
    library = page.server.log.parent / "models" / "retrieval_references"
    page.open()
    load_demo(page)
    page.run(
        f"""(() => {{
            const save = LiteGraph.createNode("RetrievalSaveReferences");
            app.graph.add(save);
            {find("RetrievalEncodeReferences")}.connect(0, save, 0);
            globalThis.saveId = save.id;
            return 1;
        }})()"""
    )
    page.click_run(page.run("saveId"))
    (saved,) = library.glob("*.safetensors")
    page.run("app.refreshComboInNodes().then(() => 1)")
    page.run(
        f"""(() => {{
            const load = LiteGraph.createNode("RetrievalLoadReferences");
            app.graph.add(load);
            {find("RetrievalControlNetLoader")}.connect(0, load, 0);
            load.widgets.find((widget) => widget.name === "file").value = "{saved.name}";
            const apply = {find("RetrievalApplyReferences")};
            load.connect(0, apply, "references");
            globalThis.loadId = load.id;
            return 1;
        }})()"""
    )
    assert len(page.click_run(page.run("loadId"))["retrieval_references"]) == 4
    shown = element("RetrievalLoadReferences", "drawn_references")
    assert page.run(f"{shown}.querySelector('.warning')") is None
    saved.unlink()
    page.run("app.refreshComboInNodes().then(() => 1)")
    page.wait(f"{shown}.querySelector('.warning')")
    assert saved.name in page.run(f"{shown}.querySelector('.warning').innerText")
    page.screenshot("file gone")


def test_a_file_that_is_new_in_the_folder_is_listed_when_the_lists_are_reloaded(any_page):
    folder = any_page.server.log.parent / "models" / "retrieval_controlnet"
    new = f"new in {any_page.host}.safetensors"
    any_page.run(f"app.graph.add(LiteGraph.createNode('{LOADER}')), 1")
    set_value(any_page, LOADER, "network", "file")
    file = f"{find(LOADER)}.widgets.find((one) => one.name === 'network.file')"
    assert any_page.run(f"{file}.options.values") == []
    folder.mkdir(exist_ok=True)
    (folder / new).touch()
    any_page.run("app.refreshComboInNodes().then(() => 1)")
    assert any_page.run(f"[{file}.value, ...{file}.options.values]") == [new, new]
    for choice in ("Hugging Face hub", "file"):
        set_value(any_page, LOADER, "network", choice)
    assert any_page.run(f"[{file}.value, ...{file}.options.values]") == [new, new]
    (folder / new).unlink()


def test_the_curve_is_the_samplers(page):
    page.open()
    texts = [*CURVES, "1, 0.5, 0", "0.3", "2,0.1,1e-1,3"]
    module = f"import('/extensions/{NAME}/retrieval.js')"
    positions = [i / 20 for i in range(21)]
    drawn = page.run(
        f"""{module}.then(({{ parseCurve, factorAt }}) => {json.dumps(texts)}.map((text) =>
            {positions}.map((position) => factorAt(parseCurve(text), position))))"""
    )
    computed = [[parse_curve(text).at(x) for x in positions] for text in texts]
    np.testing.assert_allclose(drawn, computed, atol=1e-12)
    wrong = ["1, , 2", "a", "", "inf, 1"]
    refused = f"{json.dumps(wrong)}.every((text) => parseCurve(text) === null)"
    assert page.run(f"{module}.then(({{ parseCurve }}) => {refused})")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_limits_a_trained_network_as_the_samplers_does(page, name):
    page.open()
    module = f"import('/extensions/{NAME}/retrieval.js')"
    for strength, start, end in ((1.0, 0.0, 1.0), (2.0, 0.8, 0.9), (0.5, 0.1, 0.6)):
        given = {"strength": strength, "start": start, "end": end, "preset": name}
        drawn = page.run(
            f"{module}.then(({{ limitSchedule }}) => limitSchedule({json.dumps(given)}))"
        )
        limited = PRESETS[name].limit(strength, start, end)
        assert (drawn["strength"], drawn["end"]) == limited and drawn["start"] == start


def test_the_curve_follows_edits(any_page):
    any_page.run(
        """["RetrievalControls", "RetrievalApplyReferences"].forEach((name, i) => {
            const node = LiteGraph.createNode(name);
            node.pos = [500 * i, 0];
            app.graph.add(node);
        }), 1"""
    )
    any_page.run(
        f"{find('RetrievalControls')}.connect(0, {find('RetrievalApplyReferences')}, 'controls'), 1"
    )
    set_value(any_page, "RetrievalApplyReferences", "end_percent", 0.5)
    controls = element("RetrievalControls", "drawn_curve")
    apply = element("RetrievalApplyReferences", "drawn_curve")

    def said(drawn: str) -> str:
        any_page.settle()
        return any_page.run(f"{drawn}.innerText.trim()")

    assert said(apply) == "strength 1, from 0 % to 50 % of sampling"
    path = f"{apply}.querySelectorAll('path')[1].getAttribute('d')"
    before = any_page.run(path)
    set_value(any_page, "RetrievalControls", "strength_curve", "ease in")
    assert said(controls) == "strength 0 to 1, from 0 % to 100 % of sampling"
    assert said(apply) == "strength 0 to 1, from 0 % to 50 % of sampling"
    assert any_page.run(path) != before
    set_value(any_page, "RetrievalApplyReferences", "preset", "character first")
    shown = "strength 0 to 1, from 0 % to 50 % of sampling"
    trained = "trained network: strength 0 to 1.5, until 50 %"
    assert said(apply).replace("\n", "") == shown + trained  # no line break where it is not shown
    assert any_page.run(f"{apply}.querySelectorAll('path').length") == 3
    set_value(any_page, "RetrievalApplyReferences", "preset", "prompt first")  # until 70 %
    assert said(apply) == shown
    set_value(any_page, "RetrievalControls", "strength_curve", "numbers")
    set_value(any_page, "RetrievalControls", "curve_numbers", "1, x")
    assert said(apply) == said(controls) == "'1, x' is not numbers with commas between them."
    set_value(any_page, "RetrievalControls", "curve_numbers", "1, 0.25")
    set_value(any_page, "RetrievalApplyReferences", "start_percent", 0.7)
    assert "which is before it" in said(apply)
    set_value(any_page, "RetrievalApplyReferences", "start_percent", 0.1)
    any_page.screenshot("curves")
    assert any_page.errors() == []


@needs_weights
def test_the_map_says_where_a_place_came_from(any_page):
    load_demo(any_page)
    told = any_page.click_run(any_page.run(ADD_MAP))["retrieval_map"][0]
    height, width, count = told["height"], told["width"], len(told["references"])
    shares = np.frombuffer(base64.b64decode(told["shares"]), np.uint8) / 255
    shares = shares.reshape(-1, 1 + count, height, width)
    assert count == 4 and np.allclose(shares.sum(1), 1, atol=0.01)
    any_page.screenshot("map")
    drawn = element("RetrievalMap", "drawn_map")
    picture = f"{drawn}.querySelectorAll('.picture')[1]"
    any_page.wait(f"{picture}.querySelector('img').naturalWidth")
    hover(any_page, "RetrievalMap", "drawn_map")
    any_page.browser.move(*any_page.middle(picture))
    any_page.settle()
    # The middle lies between the four positions around it.
    y, x = height // 2, width // 2
    none, *here = shares[1, :, y - 1 : y + 1, x - 1 : x + 1].mean((1, 2))
    strongest = int(np.argmax(here))
    note = any_page.run(f"{drawn}.querySelector('.note').innerText")
    assert note.startswith(f"Reference {strongest + 1}: figure: ")
    told_shares = [int(word) for word in note.replace("%", " ").split() if word.isdigit()]
    assert abs(told_shares[0] - 100 * here[strongest]) <= 3
    assert abs(told_shares[1] - 100 * none) <= 3
    faded = any_page.run(f"[...{drawn}.querySelectorAll('figure')].map((f) => f.style.opacity)")
    assert [opacity == "1" for opacity in faded] == [i == strongest for i in range(count)]
    any_page.browser.screenshot(any_page.picture("map hovered"))
    assert any_page.errors() == []


def test_a_map_of_another_picture_size_is_said_to_be_stretched(page):
    page.open()
    page.run("app.graph.add(LiteGraph.createNode('RetrievalMap')), 1")
    (page.server.log.parent / "temp").mkdir(exist_ok=True)
    Image.new("RGB", (96, 32)).save(page.server.log.parent / "temp" / "wide.png")
    shares = base64.b64encode(bytes([100] * 16 + [155] * 16)).decode()
    reference = {"image": None, "concept": "face", "weight": 1, "colour": [230, 60, 60]}
    file = {"filename": "wide.png", "subfolder": "", "type": "temp"}
    output = {"pictures": [file], "references": [reference], "height": 4, "width": 4}
    told = json.dumps({"retrieval_map": [{**output, "shares": shares}]})
    page.run(f"{find('RetrievalMap')}.onExecuted({told}), 1")
    drawn = element("RetrievalMap", "drawn_map")
    page.wait(f"{drawn}.querySelector('.warning')?.innerText")
    said = page.run(f"{drawn}.querySelector('.warning').innerText")
    assert "96 x 32" in said and "stretched" in said
    page.screenshot("map stretched")
    hover(page, "RetrievalMap", "drawn_map")
    page.browser.move(*page.middle(f"{drawn}.querySelector('.picture')"))
    page.settle()
    assert "61 % of the attention" in page.run(f"{drawn}.querySelector('.note').innerText")


def test_the_classic_canvas_draws_what_is_not_hovered_over(page):
    """No element lies over it, and the still has the element's colours in the element's place."""
    page.open()
    red = Image.new("RGB", (64, 64), (230, 20, 20))
    red.save(page.server.log.parent / "temp" / "red.png")
    file = {"filename": "red.png", "subfolder": "", "type": "temp"}
    reference = {"image": file, "concept": "figure", "weight": 1, "kept": 1}
    told = json.dumps({"retrieval_references": [reference]})
    node, drawn = find("RetrievalEncodeReferences"), "drawn_references"
    page.run("app.graph.add(LiteGraph.createNode('RetrievalEncodeReferences')), 1")
    page.run(f"{node}.onExecuted({told}), 1")
    shown = element("RetrievalEncodeReferences", drawn)
    page.wait(f"{shown}.querySelector('img').naturalWidth")
    page.fit()
    overlaid = "[...document.querySelectorAll('.retrieval')].filter((e) => e.checkVisibility())"
    assert page.run(f"{overlaid}.length") == 0
    picture = page.picture("still")
    page.browser.screenshot(picture)
    hover(page, "RetrievalEncodeReferences", drawn)
    assert page.run(f"{overlaid}.length") == 1
    x, y = page.middle(f"{shown}.querySelector('img')")
    page.browser.screenshot(page.picture("still, live"))
    for path in (picture, page.picture("still, live")):
        assert Image.open(path).convert("RGB").getpixel((round(x), round(y))) == (230, 20, 20), path
    page.browser.move(1, 1)
    page.browser.move(800, 900)
    page.wait(f"{overlaid}.length === 0", 20)
    hover(page, "RetrievalEncodeReferences", drawn)
    assert page.errors() == []
