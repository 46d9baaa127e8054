"""A ComfyUI workflow (API form) with slots for references, prompt, seed, strength and samples.

A slot is an input of a node. It is found by, in this order: a binding `role=NODE.INPUT` (NODE an id
or a title); a node whose title says `{role}`, or `{role:input}` where the node has several inputs;
the only input of the whole workflow whose name is the role. Roles are `prompt`, `seed`, `strength`,
`samples`, `reference1` to `referenceN`, and `pictures` for the node that shows the result.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RetrievalError

# role -> usual names of its input, in the order in which they are tried.
INPUTS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "text", "positive", "string", "value"),
    "seed": ("seed", "noise_seed", "value"),
    "strength": ("strength", "weight", "value"),
    "samples": ("samples", "batch_size", "amount", "value"),
    "reference": ("image",),
    "pictures": ("images",),
}
_MARK = re.compile(r"\{\s*([a-z]+\d*)\s*(?::\s*([^}]+?)\s*)?\}", re.IGNORECASE)

Slot = tuple[str, str]  # node id, name of the input


class Workflow:
    """The graph and its slots; `fill` makes the graph of one run.

    Attributes:
        slots: role -> `Slot`.

    Args:
        graph: node id -> {"class_type", "inputs", "_meta"}, as "Export (API)" writes it.
        bindings: role -> "NODE.INPUT".
        name: for messages.

    Raises:
        RetrievalError: not the API form, no slot for the prompt, the seed or a reference, two
            slots for one role, or a binding to a missing node or input.
    """

    def __init__(
        self, graph: Any, bindings: Mapping[str, str] | None = None, name: str = "workflow"
    ):
        self.name = name
        self.graph = _check_graph(graph, name)
        self._titles = {
            node: str((value.get("_meta") or {}).get("title", ""))
            for node, value in self.graph.items()
        }
        self.slots = self._find_slots(bindings or {})
        for role in ("prompt", "seed", "reference1"):
            if role not in self.slots:
                raise RetrievalError(
                    f"'{name}' has no slot for the {role}; write {{{role}}} into the title of the "
                    f"node that takes it, or add --bind {role}=NODE.INPUT."
                )

    @property
    def references(self) -> int:
        """Number of references that the workflow takes."""
        return sum(role.startswith("reference") for role in self.slots)

    def digest(self) -> str:
        """Changes with the graph and its slots."""
        text = json.dumps([self.graph, sorted(self.slots.items())], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def fill(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The graph with values (role -> value) in its slots; roles without a slot are ignored."""
        graph = copy.deepcopy(self.graph)
        for role, value in values.items():
            if role in self.slots:
                node, name = self.slots[role]
                graph[node]["inputs"][name] = value
        return graph

    def _find_slots(self, bindings: Mapping[str, str]) -> dict[str, Slot]:
        slots = {role: self._bind(role, text) for role, text in bindings.items()}
        for node, title in self._titles.items():
            for role, wanted in _MARK.findall(title):
                role = role.lower()
                _check_role(role, f"The title '{title}' in '{self.name}'")
                if role in bindings:
                    continue
                if role in slots:
                    raise RetrievalError(
                        f"'{self.name}' has two slots for the {role}, nodes {slots[role][0]} and "
                        f"{node}; keep one, or bind it with --bind."
                    )
                slots[role] = (node, self._choose_input(node, role, wanted))
        for role in ("prompt", "seed", "strength", "samples"):
            if role not in slots:
                named = [(n, role) for n, v in self.graph.items() if _holds_value(v, role)]
                if len(named) == 1:
                    slots[role] = named[0]
        numbers = sorted(int(role[9:]) for role in slots if role.startswith("reference"))
        if numbers != list(range(1, len(numbers) + 1)):
            raise RetrievalError(
                f"The references of '{self.name}' are numbered {numbers}; number them from 1 "
                "without gaps."
            )
        return slots

    def _bind(self, role: str, text: str) -> Slot:
        _check_role(role, f"The binding of {text}")
        node_name, _, wanted = text.rpartition(".") if role != "pictures" else (text, "", "")
        titled = [node for node, title in self._titles.items() if title == node_name]
        nodes = [node_name] if node_name in self.graph else titled
        if len(nodes) != 1:
            raise RetrievalError(
                f"'{self.name}' has {len(nodes)} nodes of the id or title '{node_name}' for the "
                f"{role}; bind it as {role}=NODE.INPUT with the id of one."
            )
        return nodes[0], self._choose_input(nodes[0], role, wanted)

    def _choose_input(self, node: str, role: str, wanted: str) -> str:
        """The `wanted` input, or the first of the role's usual ones that holds a value."""
        if role == "pictures":
            return ""
        names = (wanted,) if wanted else INPUTS[role.rstrip("0123456789")]
        for name in names:
            if _holds_value(self.graph[node], name):
                return name
        held = [n for n in self.graph[node]["inputs"] if _holds_value(self.graph[node], n)]
        raise RetrievalError(
            f"Node {node} ({self.graph[node]['class_type']}) of '{self.name}' has no input "
            f"{' or '.join(names)} with a value for the {role}; it has {', '.join(held) or 'none'}."
        )


def load_workflow(path: Path, bindings: Mapping[str, str] | None = None) -> Workflow:
    """Reads a workflow's JSON file; RetrievalError if it has another form, see `Workflow`."""
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RetrievalError(f"There is no workflow '{path}'; check its name.") from error
    except (OSError, ValueError) as error:
        raise RetrievalError(
            f"The workflow '{path}' cannot be read as JSON ({error}); export it again."
        ) from error
    return Workflow(graph, bindings, path.name)


def parse_bindings(texts: Sequence[str]) -> dict[str, str]:
    """`role=NODE.INPUT` texts as a dict; RetrievalError for another form."""
    found = {}
    for text in texts:
        role, _, slot = text.partition("=")
        if not (role and slot):
            raise RetrievalError(f"The binding '{text}' is not of the form role=NODE.INPUT.")
        found[role.strip().lower()] = slot.strip()
    return found


def _check_role(role: str, where: str) -> None:
    if not re.fullmatch(r"prompt|seed|strength|samples|pictures|reference\d+", role):
        raise RetrievalError(
            f"{where} names '{role}', which is no role; use one of {', '.join(INPUTS)}, references "
            "with their number (reference1)."
        )


def _holds_value(node: Mapping[str, Any], name: str) -> bool:
    """Whether the node has the input and it is a value, not a link ([node, output])."""
    return name in node["inputs"] and not isinstance(node["inputs"][name], list)


def _check_graph(graph: Any, name: str) -> dict[str, Any]:
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise RetrievalError(
            f"'{name}' is a workflow as the editor saves it; export it in the API form (Workflow > "
            "Export (API))."
        )
    good = (
        isinstance(graph, dict)
        and graph
        and all(
            isinstance(node, dict)
            and isinstance(node.get("class_type"), str)
            and isinstance(node.get("inputs"), dict)
            for node in graph.values()
        )
    )
    if not good:
        raise RetrievalError(
            f"'{name}' is not a workflow in the API form (node id to class_type and inputs); "
            "export it from ComfyUI with Workflow > Export (API)."
        )
    return {str(node): value for node, value in graph.items()}
