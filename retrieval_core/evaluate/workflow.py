"""A ComfyUI workflow (API form) with places for references, prompt, seed, strength and samples.

A place is found by, in this order: a binding `role=NODE.INPUT` (NODE an id or a title); a node
whose title says `{role}`, or `{role:input}` where the node has several inputs; the one input of the
whole workflow that is called like the role. Roles are `prompt`, `seed`, `strength`, `samples`,
`reference1` to `referenceN`, and `pictures` for the node that shows the result.
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

# role -> names of inputs that stand for it, the usual ones first.
INPUTS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "text", "positive", "string", "value"),
    "seed": ("seed", "noise_seed", "value"),
    "strength": ("strength", "weight", "value"),
    "samples": ("samples", "batch_size", "amount", "value"),
    "reference": ("image",),
    "pictures": ("images",),
}
_MARK = re.compile(r"\{\s*([a-z]+\d*)\s*(?::\s*([^}]+?)\s*)?\}", re.IGNORECASE)

Place = tuple[str, str]


class Workflow:
    """The graph and its places; `fill` makes the graph of one run.

    Args:
        graph: node id -> {"class_type", "inputs", "_meta"}, as "Export (API)" writes it.
        bindings: role -> "NODE.INPUT".
        name: for messages.

    Raises:
        RetrievalError: not the API form, no place for the prompt, the seed or a reference, a place
            found twice, or a binding to what is not there.
    """

    def __init__(
        self, graph: Any, bindings: Mapping[str, str] | None = None, name: str = "workflow"
    ):
        self.name = name
        self.graph = _checked(graph, name)
        self.places = self._found(dict(bindings or {}))
        missing = [role for role in ("prompt", "seed", "reference1") if role not in self.places]
        if missing:
            role = missing[0]
            raise RetrievalError(
                f"'{name}' has no place for the {role}; write {{{role}}} into the title of the "
                f"node that takes it, or add --bind {role}=NODE.INPUT."
            )

    @property
    def references(self) -> int:
        """How many references it takes."""
        return sum(role.startswith("reference") for role in self.places)

    @property
    def output(self) -> str | None:
        """The node whose pictures are the result; None for all that save."""
        return self.places["pictures"][0] if "pictures" in self.places else None

    def digest(self) -> str:
        """Of the graph and its places: other results, another digest."""
        text = json.dumps([self.graph, sorted(self.places.items())], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def fill(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The graph with `values` (role -> value) in its places; roles without one are left out."""
        graph = copy.deepcopy(self.graph)
        for role, value in values.items():
            if role in self.places:
                node, name = self.places[role]
                graph[node]["inputs"][name] = value
        return graph

    def _found(self, bindings: dict[str, str]) -> dict[str, Place]:
        places = {role: self._bound(role, text) for role, text in bindings.items()}
        marked = set(places)
        for node, name in ((n, t) for n, t in self._titles().items()):
            for role, wanted in _MARK.findall(name):
                role = role.lower()
                if _kind(role) not in INPUTS:
                    raise RetrievalError(
                        f"The title '{name}' in '{self.name}' says {{{role}}}, which is no role; "
                        f"use one of {', '.join(INPUTS)}, references with their number."
                    )
                if role in marked:
                    continue
                if role in places:
                    raise RetrievalError(
                        f"'{self.name}' has two places for the {role}, nodes {places[role][0]} and "
                        f"{node}; keep one, or bind it with --bind."
                    )
                places[role] = (node, self._input(node, role, wanted))
        for role in ("prompt", "seed", "strength", "samples"):
            if role not in places:
                named = [(n, role) for n, v in self.graph.items() if _literal(v, role)]
                if len(named) == 1:
                    places[role] = named[0]
        numbers = sorted(int(role[9:]) for role in places if re.fullmatch(r"reference\d+", role))
        if numbers != list(range(1, len(numbers) + 1)):
            raise RetrievalError(
                f"The references of '{self.name}' are numbered {numbers}; number them from 1 "
                "without gaps."
            )
        return places

    def _titles(self) -> dict[str, str]:
        return {
            node: str((value.get("_meta") or {}).get("title", ""))
            for node, value in self.graph.items()
        }

    def _bound(self, role: str, text: str) -> Place:
        if _kind(role) not in INPUTS or role == "reference":
            raise RetrievalError(
                f"There is no role '{role}' to bind; use one of {', '.join(INPUTS)}, references "
                "with their number (reference1)."
            )
        node_name, _, wanted = text.rpartition(".") if role != "pictures" else (text, "", "")
        nodes = [node for node in self.graph if node == node_name]
        nodes = nodes or [node for node, title in self._titles().items() if title == node_name]
        if len(nodes) != 1:
            raise RetrievalError(
                f"'{self.name}' has {len(nodes)} nodes of the id or title '{node_name}' for the "
                f"{role}; bind it as {role}=NODE.INPUT with the id of one."
            )
        return nodes[0], self._input(nodes[0], role, wanted)

    def _input(self, node: str, role: str, wanted: str) -> str:
        """The input that takes the role; the first of the usual ones that holds a value."""
        kind = _kind(role)
        if kind == "pictures":
            return ""
        names = (wanted,) if wanted else INPUTS[kind]
        for name in names:
            if _literal(self.graph[node], name):
                return name
        held = ", ".join(n for n in self.graph[node]["inputs"] if _literal(self.graph[node], n))
        raise RetrievalError(
            f"Node {node} ({self.graph[node]['class_type']}) of '{self.name}' has no input "
            f"{' or '.join(names)} with a value for the {role}; it has {held or 'none'}."
        )


def load_workflow(path: Path, bindings: Mapping[str, str] | None = None) -> Workflow:
    """Reads a workflow's JSON file; RetrievalError if it is none, see `Workflow`."""
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
        role, equals, place = text.partition("=")
        if not (role and equals and place):
            raise RetrievalError(f"The binding '{text}' is not of the form role=NODE.INPUT.")
        found[role.strip().lower()] = place.strip()
    return found


def _kind(role: str) -> str:
    return re.sub(r"\d+$", "", role) if role.startswith("reference") else role


def _literal(node: Mapping[str, Any], name: str) -> bool:
    """Whether the node's input holds a value, not a link ([node, slot])."""
    return name in node["inputs"] and not isinstance(node["inputs"][name], list)


def _checked(graph: Any, name: str) -> dict[str, Any]:
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
