"""The rooms of the pack, read off the imports: who may import whom (see ARCHITECTURE.md)."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room imports only itself, rooms before it, and the files that belong to no room.
ROOMS = (
    "network", "bank", "sampling", "training_free", "metrics", "data", "training", "evaluate",
    "paperdoll",
)  # fmt: skip
FREE = {
    "torch", "numpy", "PIL", "einops", "safetensors", "huggingface_hub", "tqdm",
    "transformers", "matplotlib", "pyarrow", "daft", "ray", "imagehash", "sklearn", "orjson",
    "accelerate", "diffusers", "bitsandbytes", "tomli",
}  # fmt: skip
OWN = {"retrieval_core", "nodes"}


def modules() -> dict[tuple[str, ...], Path]:
    files = [p for top in OWN for p in (ROOT / top).rglob("*.py")]
    return {p.relative_to(ROOT).with_suffix("").parts: p for p in files}


MODULES = modules()


def imports(name: tuple[str, ...], path: Path, top_level: bool = False) -> set[tuple[str, ...]]:
    """Modules that a file imports: of the pack by their path, others by their dotted name.

    top_level: only what is imported when the file itself is.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[tuple[str, ...]] = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = name[: len(name) - node.level] if node.level else ()
            module = start + tuple((node.module or "").split(".")) if node.module else start
            named = [(*module, alias.name) for alias in node.names]
        else:
            continue
        found.update(resolve(one) for one in named)
    return found - {name}


def resolve(name: tuple[str, ...]) -> tuple[str, ...]:
    """The module of the pack that a dotted name lies in; other names as they are."""
    for end in range(len(name), 0, -1):
        for module in (name[:end], (*name[:end], "__init__")):
            if module in MODULES:
                return module
    return name


GRAPH = {name: imports(name, path) for name, path in MODULES.items()}


def room(name: tuple[str, ...]) -> str:
    return name[1] if name[0] == "retrieval_core" and len(name) > 2 else ""


def edges():
    return [(a, b) for a, targets in sorted(GRAPH.items()) for b in sorted(targets)]


def dotted(pairs) -> list[str]:
    return [f"{'.'.join(a)} imports {'.'.join(b)}" for a, b in pairs]


def test_every_folder_of_the_core_is_a_room():
    assert {room(name) for name in MODULES} == {"", *ROOMS}


def test_only_nodes_host_knows_the_host():
    def host(name):
        return name[0] not in sys.stdlib_module_names | FREE | OWN | {"comfy_api"}

    wrong = [(a, b) for a, b in edges() if host(b) and a[:2] != ("nodes", "host")]
    wrong += [(a, b) for a, b in edges() if b[0] == "comfy_api" and a[0] != "nodes"]
    assert dotted(wrong) == []


def test_the_core_does_not_import_nodes():
    assert dotted((a, b) for a, b in edges() if (a[0], b[0]) == ("retrieval_core", "nodes")) == []


def test_a_room_imports_only_rooms_before_it():
    def wrong(a, b):
        if a[0] != "retrieval_core" or not room(b):
            return False
        return not room(a) or ROOMS.index(room(b)) > ROOMS.index(room(a))

    assert dotted((a, b) for a, b in edges() if wrong(a, b)) == []


def test_only_paperdoll_modules_import_the_paper_dolls():
    def doll(name):
        return room(name) == "paperdoll" or "paperdoll" in name[-1]

    assert dotted((a, b) for a, b in edges() if room(b) == "paperdoll" and not doll(a)) == []


def test_heavy_libraries_are_imported_only_where_they_are_used():
    heavy = {"transformers", "matplotlib", "diffusers", "accelerate", "pyarrow", "daft", "ray"}
    heavy |= {"imagehash", "sklearn"}
    wrong = [
        (name, found)
        for name, path in MODULES.items()
        for found in imports(name, path, top_level=True)
        if found[0] in heavy
    ]
    assert dotted(wrong) == []


def test_no_two_modules_have_one_name():
    counts = Counter(name[-1] for name in MODULES if not name[-1].startswith("__"))
    assert [name for name, count in counts.items() if count > 1] == []


def test_no_circles():
    done: set[tuple[str, ...]] = set()

    def visit(name, path):
        assert name not in path, " -> ".join(".".join(one) for one in (*path, name))
        if name not in done:
            for target in sorted(GRAPH.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


@pytest.mark.parametrize("top", sorted(OWN))
def test_the_reader_of_imports_sees_them(top):
    assert sum(a[0] == top for a, _ in edges()) > 50


def test_the_functions_that_the_architecture_names_exist():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| (.*?) \| `(.*?)` \|", text, re.MULTILINE)
    assert len(rows) == 24
    for functions, path in rows:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        found = set()
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{m.name}" for m in node.body if hasattr(m, "name")}
        assert set(re.findall(r"`(.*?)`", functions)) <= found, f"{functions} in {path}"
    for path in re.findall(r"`((?:nodes|retrieval_core|tests)/[\w/]+\.py)`", text):
        assert (ROOT / path).is_file(), path
