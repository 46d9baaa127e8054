"""The example workflows and blueprints, and their API form: what the frontend posts to /prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[2]
FOLDER = PACK / "example_workflows"
BLUEPRINTS = PACK / "subgraphs"
FRONTEND_ONLY = {"MarkdownNote", "Note"}
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC}


def example(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def inputs_of(
    info: dict[str, Any], values: dict[str, Any] | None = None
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Input name -> (type, options), in order, of one entry of /object_info.

    Args:
        values: of the node's widgets: a DynamicCombo also has the fields of the choice made.
    """
    return dict(_expand(info["input"], values or {}))


def _expand(
    given: dict[str, Any], values: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, tuple[Any, dict[str, Any]]]]:
    for part in ("required", "optional"):
        for name, (kind, *more) in given.get(part, {}).items():
            options = more[0] if more else {}
            yield prefix + name, (kind, options)
            if kind == DYNAMIC:
                for option in options["options"]:
                    if option["key"] == values.get(prefix + name):
                        yield from _expand(option["inputs"], values, f"{prefix}{name}.")


def read_widgets(info: dict[str, Any], saved: list[Any]) -> dict[str, Any]:
    """Input name -> value of a node's `widgets_values`, which must hold exactly these; but the last
    optional ones may be missing, as in workflows saved before there were these."""
    values: dict[str, Any] = {}
    left = list(saved)
    for name, (kind, options) in _expand(info["input"], values):
        if not (isinstance(kind, list) or kind in WIDGETS) or options.get("forceInput"):
            continue
        if not left and name in info["input"].get("optional", {}):
            continue
        values[name] = left.pop(0)
        # Beside a seed stands what is done with it after a run, beside an upload its button.
        if options.get("control_after_generate") or options.get("image_upload"):
            left.pop(0)
    assert not left, left
    return values


def api_form(workflow: dict[str, Any], node_info: dict[str, Any]) -> dict[str, Any]:
    """The prompt of a workflow as it was saved; node_info is the answer of /object_info."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in FRONTEND_ONLY:
            continue
        values = read_widgets(node_info[node["type"]], node.get("widgets_values", []))
        linked = {
            given["name"]: sources[given["link"]]
            for given in node["inputs"]
            if given.get("link") is not None
        }
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": {**values, **linked}}
    return prompt


def expand_blueprint(
    blueprint: dict[str, Any], node_info: dict[str, Any], sources: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The prompt of a blueprint's inner nodes, and where each of its outputs comes from.

    Args:
        sources: input of the blueprint -> the node and output that are connected to it.
    """
    (outer,), (inner,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    values = {
        name: value
        for (node, name), value in zip(outer["properties"]["proxyWidgets"], outer["widgets_values"])
        if node == "-1"
    }
    given = {**values, **sources}
    links = {link["id"]: link for link in inner["links"]}
    prompt = {}
    for node in inner["nodes"]:
        inputs = read_widgets(node_info[node["type"]], node["widgets_values"])
        for slot in node["inputs"]:
            if slot["link"] is None:
                continue
            link = links[slot["link"]]
            if link["origin_id"] != inner["inputNode"]["id"]:
                inputs[slot["name"]] = [f"inner {link['origin_id']}", link["origin_slot"]]
            elif inner["inputs"][link["origin_slot"]]["name"] in given:
                inputs[slot["name"]] = given[inner["inputs"][link["origin_slot"]]["name"]]
        prompt[f"inner {node['id']}"] = {"class_type": node["type"], "inputs": inputs}
    outputs = {}
    for output in inner["outputs"]:
        link = links[output["linkIds"][0]]
        outputs[output["name"]] = [f"inner {link['origin_id']}", link["origin_slot"]]
    return prompt, outputs


def the_node(prompt: dict[str, Any], kind: str, **inputs: Any) -> str:
    """The id of the one node of a class whose inputs are these."""
    (found,) = (
        key
        for key, node in prompt.items()
        if node["class_type"] == kind and inputs.items() <= node["inputs"].items()
    )
    return found
