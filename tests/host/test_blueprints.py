"""The blueprints in subgraphs/: each is one node to drop in, with valid links, and draws."""

from __future__ import annotations

import json

import numpy as np
import pytest
from retrieval_pack.nodes.load_retrieval_controlnet import DEMO, TRAINING_FREE
from serving import with_inputs
from workflows import (
    BLUEPRINTS,
    api_form,
    example,
    expand_blueprint,
    inputs_of,
    read_widgets,
    the_node,
)

NAMES = sorted(path.stem for path in BLUEPRINTS.glob("*.json"))
APPLY, ENCODE, LOADER = (
    "RetrievalApplyReferences",
    "RetrievalEncodeReferences",
    "RetrievalControlNetLoader",
)
INPUT, OUTPUT = -10, -20  # ids of the subgraph's own ends


@pytest.fixture(params=NAMES)
def blueprint(request):
    return example(request.param, BLUEPRINTS)


def test_there_are_the_promised_blueprints(server):
    served = server.json("/global_subgraphs").values()
    ours = {one["name"] for one in served if one["info"]["node_pack"].startswith("custom_nodes.")}
    assert ours == set(NAMES)
    assert ours == {"Character from pictures", "Face of one, clothes of another", "Two characters"}


def test_it_is_one_node_that_the_frontend_can_list(blueprint):
    (outer,), (inner,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert outer["type"] == inner["id"] and blueprint["links"] == []
    for side in ("inputs", "outputs"):
        shown = [(slot["name"], slot["type"]) for slot in outer[side]]
        assert shown == [(slot["name"], slot["type"]) for slot in inner[side]]
    assert inner["description"].endswith(".") and inner["category"] == "retrieval"
    assert "consistent character" in blueprint["extra"]["BlueprintSearchAliases"]
    proxies = outer["properties"]["proxyWidgets"]
    assert len(proxies) == len(outer["widgets_values"])
    widgets = {slot["name"] for slot in outer["inputs"] if "widget" in slot}
    assert {name for node, name in proxies if node == "-1"} == widgets
    names = {str(node["id"]): [slot["name"] for slot in node["inputs"]] for node in inner["nodes"]}
    assert all(name in names[node] for node, name in proxies if node != "-1")


def test_what_masks_mark_and_the_preset_are_its_own_settings(blueprint):
    """For all of its nodes: a mask of a segmentation node marks the subject."""
    (outer,), (inner,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    proxies = outer["properties"]["proxyWidgets"]
    inputs = {slot["name"]: set(slot["linkIds"]) for slot in inner["inputs"]}
    for kind, name in ((ENCODE, "mask_marks"), (APPLY, "preset")):
        nodes = [node for node in inner["nodes"] if node["type"] == kind]
        links = {slot["link"] for n in nodes for slot in n["inputs"] if slot["name"] == name}
        if ["-1", name] in proxies:
            assert links == inputs[name] and len(links) == len(nodes)
        else:
            assert [[str(node["id"]), name] for node in nodes] == [p for p in proxies if name in p]


def test_its_nodes_exist_with_valid_links_and_values(blueprint, node_info):
    (inner,) = blueprint["definitions"]["subgraphs"]
    nodes = {node["id"]: node for node in inner["nodes"]}
    assert len(nodes) == len(inner["nodes"])
    seen = set()
    for link in inner["links"]:
        source, target = link["origin_id"], link["target_id"]
        if source == INPUT:
            assert link["id"] in inner["inputs"][link["origin_slot"]]["linkIds"]
            kind = inner["inputs"][link["origin_slot"]]["type"]
        else:
            made = nodes[source]["outputs"][link["origin_slot"]]
            assert link["id"] in made["links"]
            kind = node_info[nodes[source]["type"]]["output"][link["origin_slot"]]
        assert kind == link["type"]
        if target == OUTPUT:
            assert inner["outputs"][link["target_slot"]]["linkIds"] == [link["id"]]
            continue
        slot = nodes[target]["inputs"][link["target_slot"]]
        assert slot["link"] == link["id"]
        info = node_info[nodes[target]["type"]]
        wanted, _ = inputs_of(info, read_widgets(info, nodes[target]["widgets_values"]))[
            slot["name"]
        ]
        assert wanted == kind, (nodes[target]["type"], slot["name"])
        seen.add(link["id"])
    shown = {slot["link"] for node in nodes.values() for slot in node["inputs"]} - {None}
    assert shown == seen


# Blueprint -> the demo workflow that has the same nodes, and its references by input.
DEMOS = {
    "Character from pictures": ("Demo - Same character", {"images": {}}),
    "Face of one, clothes of another": (
        "Demo - Face of one, clothes of another",
        {"face": {"concept": "face"}, "clothes": {"concept": "clothes"}},
    ),
    "Two characters": (
        "Demo - Two characters",
        {"left": {"character": 3}, "right": {"character": 11}},
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_it_draws_what_its_nodes_draw_in_a_workflow(name, server, node_info):
    demo, references = DEMOS[name]
    prompt = api_form(example(demo), node_info)
    for key, node in prompt.items():
        if node["class_type"] == APPLY:
            prompt = with_inputs(prompt, key, end_percent=1.0)
        if node["class_type"] == "KSampler":
            prompt = with_inputs(prompt, key, steps=2)
    plain = the_node(prompt, "RetrievalPaperdollModel")
    sampler = next(
        key
        for key, node in prompt.items()
        if node["class_type"] == "KSampler" and node["inputs"]["model"] != [plain, 0]
    )
    (save,) = (
        key
        for key, node in prompt.items()
        if node["class_type"] == "SaveImage" and "without" not in node["inputs"]["filename_prefix"]
    )
    sources = {"model": [plain, 0], "clip": [plain, 1], "vae": [plain, 2]}
    for given, which in references.items():
        sources[given] = [the_node(prompt, "RetrievalPaperdollReference", **which), 0]
    inner, outputs = expand_blueprint(example(name, BLUEPRINTS), node_info, sources)
    (loader,) = (key for key, node in inner.items() if node["class_type"] == LOADER)
    assert inner[loader]["inputs"]["network"] == TRAINING_FREE
    inner[loader]["inputs"]["network"] = DEMO
    dropped = {**with_inputs(prompt, sampler, model=outputs["model"]), **inner}
    drawn = []
    for one in (prompt, dropped):
        entry = server.run(one)
        assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])
        drawn.append(server.images(entry, save))
    assert np.array_equal(*drawn)
    assert drawn[0].std() > 5
