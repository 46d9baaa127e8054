"""Saved workflows load: nodes stay as they were released, and those before are replaced."""

from __future__ import annotations

import asyncio
import copy
import json
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from released import RECORD, describe_nodes, find_breaks, read_released, stand_in_for_server
from retrieval_pack.nodes.load_retrieval_controlnet import (
    FILE,
    RetrievalControlNetLoader,
)
from retrieval_pack.nodes.replaced_nodes import (
    OLD_LOADER,
    OLD_LOADER_WIDGETS,
    register_replacements,
)
from serving import with_inputs
from workflows import api_form, example, the_node

# Example workflows of version 0.1, from before the loader showed the fields of one choice only.
OLD = Path(__file__).with_name("saved_before_renames")
NEW_NAMES = {
    "paperdoll_same_character": "Demo - Same character",
    "paperdoll_face_plus_clothes": "Demo - Face of one, clothes of another",
    "paperdoll_two_characters_by_region": "Demo - Two characters",
    "paperdoll_score_diversity": "Demo - How different the pictures are",
    "sd15_same_character": "Same character (SD 1.5)",
}


def test_no_saved_workflow_breaks():
    released, now = read_released(), describe_nodes()
    assert not find_breaks(released, now)
    for node in now:
        assert node in released, f"{node} is not in released_nodes.json; {RECORD}."
        for part in ("inputs", "outputs"):
            new = [name for name in now[node][part] if name not in released[node][part]]
            assert not new, f"{new} of {node} is not in released_nodes.json; {RECORD}."


def lose_node(nodes):
    del nodes["RetrievalMap"]


def lose_input(nodes):
    del nodes["RetrievalMap"]["inputs"]["masks"]


def change_type(nodes):
    nodes["RetrievalMap"]["inputs"]["reference"]["type"] = "FLOAT"


def lose_value(nodes):
    nodes["RetrievalMap"]["inputs"]["masks"]["values"].remove("shares")


def lose_choice(nodes):
    del nodes["RetrievalControlNetLoader"]["inputs"]["network"]["choices"][FILE]


def lose_field(nodes):
    choices = nodes["RetrievalControlNetLoader"]["inputs"]["network"]["choices"]
    del choices["Hugging Face hub"]["revision"]


def need_more(nodes):
    image = {"type": "IMAGE", "widget": False, "required": True}
    nodes["RetrievalMap"]["inputs"]["background"] = image


def insert_widget(nodes):
    number = {"type": "INT", "widget": True, "required": False}
    encode = nodes["RetrievalEncodeReferences"]
    encode["inputs"] = {"opacity": number, **encode["inputs"]}


def swap_widgets(nodes):
    inputs = nodes["RetrievalMap"]["inputs"]
    nodes["RetrievalMap"]["inputs"] = dict(reversed(inputs.items()))


def swap_outputs(nodes):
    nodes["RetrievalMap"]["outputs"].reverse()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose_node, "RetrievalMap is gone"),
        (lose_input, "lost its input masks"),
        (change_type, "was INT and is FLOAT"),
        (lose_value, "the saved value 'shares'"),
        (lose_choice, "the choice 'file'"),
        (lose_field, "lost its input revision"),
        (need_more, "needs the new input background"),
        (insert_widget, "begin with concept, weight, opacity, size"),
        (swap_widgets, "begin with reference, masks"),
        (swap_outputs, "were [['overlay', 'IMAGE'], ['masks', 'MASK']]"),
    ],
)
def test_what_breaks_saved_workflows_is_said_in_words(change, words):
    changed = copy.deepcopy(read_released())
    change(changed)
    (sentence,) = find_breaks(read_released(), changed)
    assert words in sentence and sentence.endswith(".")


def test_what_can_be_added_breaks_nothing():
    changed = copy.deepcopy(read_released())
    number = {"type": "INT", "widget": True, "required": False}
    changed["RetrievalMap"]["inputs"]["opacity"] = number
    changed["RetrievalMap"]["inputs"]["masks"]["values"].append("weights")
    changed["RetrievalMap"]["outputs"].append(["weights", "FLOAT"])
    changed["RetrievalNew"] = changed["RetrievalMap"]
    assert not find_breaks(read_released(), changed)


# Inputs whose default was another in version 0.1, and optional ones that it did not have.
CHANGED = ("network.layers",)
LATER = {"preset": "balanced", "subject_mask": "automatic"}


def old_prompt(name, node_info):
    """What the frontend posted of a workflow of version 0.1."""
    widgets = {widget: ["STRING"] for widget in OLD_LOADER_WIDGETS}
    loader = {"input": {"required": {"model": ["MODEL"], **widgets}}}
    prompt = api_form(example(name, OLD), {**node_info, OLD_LOADER: loader})
    return {key: {**node, "_meta": {"title": node["class_type"]}} for key, node in prompt.items()}


@pytest.fixture
def replace(monkeypatch):
    """Replaces the nodes of a prompt as the host's server does."""
    manager_module = pytest.importorskip(
        "app.node_replace_manager", reason="this ComfyUI cannot replace nodes (0.8.0)"
    )
    import nodes

    manager = manager_module.NodeReplaceManager()
    stand_in_for_server(monkeypatch, manager)
    asyncio.run(register_replacements())
    known = {"RetrievalControlNetLoader": RetrievalControlNetLoader}
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", known)
    return manager.apply_replacements


@pytest.mark.parametrize("name", NEW_NAMES)
def test_an_old_loader_becomes_the_new_one_with_its_values(name, node_info, replace):
    prompt = old_prompt(name, node_info)
    replace(prompt)
    today = api_form(example(NEW_NAMES[name]), node_info)
    assert prompt.keys() == today.keys()
    for key, node in today.items():
        assert prompt[key]["class_type"] == node["class_type"]
        expected = {k: v for k, v in node["inputs"].items() if k not in CHANGED}
        assert expected.items() <= (LATER | prompt[key]["inputs"]).items()


def test_an_old_prompt_draws_what_the_new_one_draws_or_is_refused_by_name(server, node_info):
    old = short(old_prompt("paperdoll_same_character", node_info))
    try:
        replacements = server.json("/node_replacements")
    except urllib.error.HTTPError:  # 0.8.0
        status, answer = server.post("/prompt", {"prompt": old})
        assert status == 400 and OLD_LOADER in json.dumps(answer["error"])
        return
    assert OLD_LOADER in replacements
    new = short(api_form(example("Demo - Same character"), node_info))
    save = the_node(new, "SaveImage", filename_prefix="retrieval/paperdoll_same_character")
    drawn = [server.images(server.run(prompt), save) for prompt in (old, new)]
    assert np.array_equal(*drawn)


def short(prompt):
    for key, node in prompt.items():
        if node["class_type"] == "KSampler":
            prompt = with_inputs(prompt, key, steps=2)
    return prompt
