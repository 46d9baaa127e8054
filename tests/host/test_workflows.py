"""Each example workflow fits the nodes of the running server, and has a picture."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import pytest
from PIL import Image
from workflows import DYNAMIC, FOLDER, FRONTEND_ONLY, api_form, example, inputs_of, read_widgets

NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
# Files that the user has to bring, named in the workflow's note.
FILES = {"ckpt_name", "image"}


@pytest.fixture(params=NAMES)
def workflow(request):
    return example(request.param)


def test_there_are_the_promised_workflows():
    assert set(NAMES) == {
        "Demo - Same character",
        "Demo - Face of one, clothes of another",
        "Demo - Two characters",
        "Demo - How different the pictures are",
        "Demo - New character",
        "Same character (SD 1.5)",
        "Face of one, clothes of another (SD 1.5)",
        "Two characters (SD 1.5)",
        "Same character (SDXL)",
    }
    # The template browser shows the file's name; any file system can hold it.
    assert all(re.fullmatch(r"[A-Za-z0-9 .,()-]+", name) for name in NAMES)


def test_each_begins_with_a_note(workflow):
    (note,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    assert note["widgets_values"][0].startswith("## ") and note["pos"][0] == 0


def test_every_node_is_known(workflow, node_info):
    assert {node["type"] for node in workflow["nodes"]} - FRONTEND_ONLY <= node_info.keys()
    ids = [node["id"] for node in workflow["nodes"]]
    assert len(set(ids)) == len(ids) and max(ids) == workflow["last_node_id"]


def test_links_join_outputs_and_inputs_of_their_type(workflow, node_info):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, output, target, slot, kind in workflow["links"]:
        given, made = nodes[target]["inputs"][slot], nodes[source]["outputs"][output]
        assert given["link"] == link and link in made["links"]
        assert node_info[nodes[source]["type"]]["output"][output] == kind
        wanted, _ = inputs_of(node_info[nodes[target]["type"]])[given["name"]]
        assert wanted in ("*", kind), (nodes[target]["type"], given["name"])
    linked = [i["link"] for n in nodes.values() for i in n.get("inputs", []) if i.get("link")]
    assert sorted(linked) == sorted(link[0] for link in workflow["links"])


def test_values_fit_the_inputs(workflow, node_info):
    for node in api_form(workflow, node_info).values():
        inputs = inputs_of(node_info[node["class_type"]], node["inputs"])
        required = node_info[node["class_type"]]["input"].get("required", {})
        assert required.keys() <= node["inputs"].keys() <= inputs.keys()
        for name, value in node["inputs"].items():
            kind, options = inputs[name]
            if isinstance(value, list) or name in FILES:
                continue
            if isinstance(kind, list) or kind == "COMBO":
                assert value in (kind if isinstance(kind, list) else options["options"]), name
            elif kind == DYNAMIC:
                assert value in [option["key"] for option in options["options"]], name
            elif kind in ("INT", "FLOAT"):
                low, high = options.get("min", value), options.get("max", value)
                assert isinstance(value, int | float) and low <= value <= high, name
            else:
                assert isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind]), name


def test_the_slots_shown_are_the_nodes_own(workflow, node_info):
    for node in workflow["nodes"]:
        if node["type"] not in FRONTEND_ONLY:
            info = node_info[node["type"]]
            values = read_widgets(info, node["widgets_values"])
            assert {slot["name"] for slot in node["inputs"]} <= inputs_of(info, values).keys()
            shown = [slot["type"] for slot in node["outputs"]]
            if node["type"].startswith("Retrieval"):
                assert shown == info["output"]
            else:  # a newer host's nodes may give more
                assert shown == info["output"][: len(shown)]


def test_pictures_are_saved_below_the_output_folder(workflow, node_info):
    for node in api_form(workflow, node_info).values():
        prefix = PurePosixPath(node["inputs"].get("filename_prefix", "a"))
        assert not prefix.is_absolute() and ".." not in prefix.parts


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_thumbnail(name):
    with Image.open(FOLDER / f"{name}.jpg") as picture:
        picture.load()
        assert picture.format == "JPEG" and picture.size == (640, 640)  # shown in a square
        colours = picture.convert("RGB").resize((32, 32)).getcolors(1024)
        assert len(colours) > 20  # not a blank
