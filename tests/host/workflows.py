"""The example workflows, and their API form: what the frontend posts to /prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[2]
FOLDER = PACK / "example_workflows"
FRONTEND_ONLY = {"MarkdownNote", "Note"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def example(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def inputs_of(info: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Input name -> (type, options), in order, of one entry of /object_info."""
    found = {}
    for part in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(part, {}).items():
            found[name] = (kind, options[0] if options else {})
    return found


def widget_names(info: dict[str, Any]) -> list[str | None]:
    """What each of a node's `widgets_values` is for; None is a control that is never posted."""
    names: list[str | None] = []
    for name, (kind, options) in inputs_of(info).items():
        if not (isinstance(kind, list) or kind in WIDGETS) or options.get("forceInput"):
            continue
        names.append(name)
        # Beside a seed stands what is done with it after a run, beside an upload its button.
        if options.get("control_after_generate") or options.get("image_upload"):
            names.append(None)
    return names


def api_form(workflow: dict[str, Any], node_info: dict[str, Any]) -> dict[str, Any]:
    """The prompt of a workflow as it was saved; node_info is the answer of /object_info."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in FRONTEND_ONLY:
            continue
        names = widget_names(node_info[node["type"]])
        values = dict(zip(names, node.get("widgets_values", []), strict=True))
        values.pop(None, None)
        linked = {
            given["name"]: sources[given["link"]]
            for given in node["inputs"]
            if given.get("link") is not None
        }
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": {**values, **linked}}
    return prompt


def the_node(prompt: dict[str, Any], kind: str, **inputs: Any) -> str:
    """The id of the one node of a class whose inputs are these."""
    (found,) = (
        key
        for key, node in prompt.items()
        if node["class_type"] == kind and inputs.items() <= node["inputs"].items()
    )
    return found
