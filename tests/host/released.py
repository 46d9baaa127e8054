"""What a saved workflow holds of the pack's nodes, and what would break one."""

from __future__ import annotations

import asyncio
import json
import sys
import types
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from retrieval_pack.nodes import RetrievalExtension

FILE = Path(__file__).with_name("released_nodes.json")
RECORD = "run `python -m pytest tests/host/record_released.py` to record it"


def read_released() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def write_released(nodes: dict[str, Any]) -> None:
    FILE.write_text(json.dumps(nodes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def stand_in_for_server(monkeypatch: Any, replace_manager: Any) -> None:
    """Gives the host's API a server where it registers replacements of nodes (0.8.0 does not)."""
    running = types.SimpleNamespace(node_replace_manager=replace_manager)
    module = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=running))
    monkeypatch.setitem(sys.modules, "server", module)


def describe_nodes() -> dict[str, Any]:
    """Node id -> its inputs and outputs, in order."""
    schemas = [node.GET_SCHEMA() for node in asyncio.run(RetrievalExtension().get_node_list())]
    return {
        schema.node_id: {
            "inputs": describe_inputs(schema.inputs),
            "outputs": [[made.display_name, made.get_io_type()] for made in schema.outputs],
        }
        for schema in schemas
    }


def describe_inputs(inputs: list[io.Input]) -> dict[str, Any]:
    """Input -> its type; whether it is a widget and required; the values or choices it offers."""
    described = {}
    for given in inputs:
        chosen = isinstance(given, io.DynamicCombo.Input)
        entry: dict[str, Any] = {
            "type": given.get_io_type(),
            "widget": chosen or isinstance(given, io.WidgetInput),
            "required": not given.optional,
        }
        if chosen:
            entry["choices"] = {one.key: describe_inputs(one.inputs) for one in given.options}
        elif isinstance(given, io.Combo.Input):
            entry["values"] = list(given.options)
        described[given.id] = entry
    return described


def find_breaks(released: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A sentence for each change between two answers of `describe_nodes` that breaks workflows."""
    breaks = []
    for node, old in released.items():
        if node not in now:
            breaks.append(
                f"Node {node} is gone, so workflows that have it do not load; keep it, or add its "
                "replacement to nodes/replaced_nodes.py."
            )
            continue
        breaks += compare_inputs(node, old["inputs"], now[node]["inputs"])
        kept = now[node]["outputs"][: len(old["outputs"])]
        if [kind for _, kind in kept] != [kind for _, kind in old["outputs"]]:
            breaks.append(
                f"The outputs of {node} were {old['outputs']} and are {now[node]['outputs']}, and "
                "saved links count them; add outputs behind the last one only."
            )
    return breaks


def compare_inputs(where: str, released: dict[str, Any], now: dict[str, Any]) -> list[str]:
    breaks = []
    for name, old in released.items():
        new = now.get(name)
        if new is None:
            breaks.append(f"{where} lost its input {name}, and with it what workflows saved there.")
            continue
        if new["type"] != old["type"] or new["widget"] != old["widget"]:
            breaks.append(
                f"Input {name} of {where} was {old['type']} and is {new['type']}; give the new one "
                "another name."
            )
        for value in set(old.get("values", ())) - set(new.get("values", ())):
            breaks.append(f"Input {name} of {where} no longer offers the saved value {value!r}.")
        for choice, fields in old.get("choices", {}).items():
            if choice not in new.get("choices", {}):
                breaks.append(f"Input {name} of {where} no longer offers the choice {choice!r}.")
            else:
                inside = f"choice {choice!r} of {where}.{name}"
                breaks += compare_inputs(inside, fields, new["choices"][choice])
    for name in now.keys() - released.keys():
        if now[name]["required"]:
            breaks.append(
                f"{where} needs the new input {name}, which workflows do not have; make it "
                "optional, with a default."
            )
    before, after = list_widgets(released), list_widgets(now)
    first = after[: len(before)]
    if set(before) <= set(after) and first != before:
        breaks.append(
            f"The widgets of {where} were {', '.join(before)} and begin with {', '.join(first)}; "
            "workflows save values by position, so add widgets behind the last one only."
        )
    return breaks


def list_widgets(inputs: dict[str, Any]) -> list[str]:
    """The names of the widgets as the frontend saves their values: optional ones come last."""
    widgets = [name for name, entry in inputs.items() if entry["widget"]]
    return sorted(widgets, key=lambda name: not inputs[name]["required"])
