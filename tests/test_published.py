"""What is published in the Comfy registry: which files, that they suffice, and a security scan."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from published import PACK, list_published, read_ignored

MODULES = [path for path in list_published() if path.endswith(".py")]

# Of the standard library and its common companions: run programs, unpickle, reach a network.
PROGRAMS = {"subprocess", "multiprocessing", "pty", "ctypes"}
PICKLES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
NETWORK = {
    "socket", "socketserver", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp",
    "ftplib", "smtplib", "telnetlib", "xmlrpc", "websocket", "websockets", "paramiko", "wget",
}  # fmt: skip
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.startfile", "os.execv",
    "os.spawnv", "os.getenv", "os.environb", "torch.load",
}  # fmt: skip
# What the scan may find, and why.
NAMED = {
    ("nodes/host/dataset_folder.py", "os.environ"): "quiets the data engine; nothing is read",
    ("retrieval_core/data/stages.py", "os.environ"): "stops the data engine's reports of its use",
    ("retrieval_core/hub.py", "huggingface_hub"): "downloads that a user asks for",
    ("retrieval_core/metrics/model_folder.py", "huggingface_hub"): "the same",
}


def scan(source: str) -> set[str]:
    """What a security scanner looks for in a module: modules imported, functions called."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module.split(".")[0]]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        watched = PROGRAMS | PICKLES | NETWORK | CALLS | {"os.environ", "huggingface_hub"}
        found |= watched & set(names)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            found |= CALLS & {ast.unparse(node.func)}
        if isinstance(node, ast.Attribute):
            found |= {"os.environ"} & {ast.unparse(node)}
    return found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import subprocess", {"subprocess"}),
        ("from urllib.request import urlopen", {"urllib"}),
        ("import os\nos.environ['HOME']", {"os.environ"}),
        ("from os import environ", {"os.environ"}),
        ("eval('1')", {"eval"}),
        ("model.eval()", set()),
        ("import torch\ntorch.load('a')", {"torch.load"}),
        ("import pickle as p", {"pickle"}),
        ("from .http import x", set()),
    ],
)
def test_the_scan_sees(line, expected):
    assert scan(line) == expected


def test_the_scan_finds_nothing_but_what_is_named():
    found = {}
    for path in MODULES:
        for name in scan((PACK / path).read_text(encoding="utf-8")):
            found[path, name] = NAMED.get((path, name))
    print("".join(f"\nscan: {path}: {name} ({why})" for (path, name), why in found.items()))
    assert found == NAMED


def test_the_list_is_what_git_and_the_ignore_file_leave():
    def ask(*words: str) -> set[str]:
        line = ["git", "-c", "core.quotePath=off", "-C", str(PACK), "ls-files", *words]
        try:
            return set(
                subprocess.check_output(line, text=True, stderr=subprocess.DEVNULL).split("\n")
            )
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this copy of the pack is no git repository")

    tracked, ignored = ask(), ask("--cached", "--ignored", "--exclude-from=.comfyignore")
    new = ask("--others", "--exclude-standard")
    published = {path for path in tracked - ignored if (PACK / path).is_file()}
    assert set(list_published()) - new == published


def test_nothing_is_ignored_that_is_not_there():
    missing = [path for path in read_ignored() if not (PACK / path).exists()]
    assert not missing


def list_imported(path: str) -> list[set[str]]:
    """For each relative import of a module of the pack, the files that it names."""
    imported = []
    for node in ast.walk(ast.parse((PACK / path).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        home = Path(path).parents[node.level - 1] / (node.module or "").replace(".", "/")
        named = [home, *(home / alias.name for alias in node.names)]
        files = [one.with_suffix(".py").as_posix() for one in named if one.name]
        files += [(one / "__init__.py").as_posix() for one in named]
        imported.append({file for file in files if (PACK / file).is_file()})
    return imported


def test_what_is_published_imports_only_what_is_published():
    known = set(list_published())
    for path in MODULES:
        for files in list_imported(path):
            assert files and files <= known, f"{path} imports {files}"


def test_every_published_module_is_reached_from_a_door():
    """From the nodes and the two published commands; what only the demo's training uses is not."""
    doors = ["__init__.py", *(path for path in MODULES if path.endswith("/__main__.py"))]
    assert len(doors) == 3
    reached, left = set(), doors
    while left:
        path = left.pop()
        if path not in reached:
            reached.add(path)
            packages = {(above / "__init__.py").as_posix() for above in Path(path).parents}
            left += set().union(packages & set(MODULES), *list_imported(path))
    assert set(MODULES) - reached == set()


def test_every_picture_that_the_readme_shows_is_published():
    readme = (PACK / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"!\[[^\]]+\]\(([^)]+)\)", readme))
    assert shown and shown <= set(list_published())


def test_the_package_is_small():
    packed = io.BytesIO()
    sizes = {path: (PACK / path).stat().st_size for path in list_published()}
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sizes:
            archive.write(PACK / path, path)
    zipped = len(packed.getvalue())
    weights = sum(size for path, size in sizes.items() if path.endswith(".safetensors"))
    total = sum(sizes.values())
    print("".join(f"\n{size:>10,}  {path}" for path, size in sizes.items()))
    print(
        f"package: {len(sizes)} files, {total / 1e6:.2f} MB, of which {weights / 1e6:.2f} MB "
        f"weights of the demo; zipped {zipped / 1e6:.2f} MB"
    )
    assert total - weights < 4e6 and zipped < 30e6
