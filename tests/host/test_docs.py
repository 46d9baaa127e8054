"""The help page of each node, which the frontend shows: web/docs/<node id>.md."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from comfy_api.latest import io
from retrieval_pack.nodes import RetrievalExtension

DOCS = Path(__file__).resolve().parents[2] / "web" / "docs"
NODES = {
    node.GET_SCHEMA().node_id: node.GET_SCHEMA()
    for node in asyncio.run(RetrievalExtension().get_node_list())
}


def named(page: str, heading: str) -> list[str]:
    """The names in the first column of the table under a heading."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return re.findall(r"^\| `([^`]+)` \| \S", section[1], re.MULTILINE) if section else []


def list_fields(given: io.Input) -> list[io.Input]:
    """An input, and the fields of all choices of a DynamicCombo."""
    return given.get_all() if isinstance(given, io.DynamicCombo.Input) else [given]


@pytest.mark.parametrize("node", NODES)
def test_the_page_names_every_input_and_output(node):
    schema = NODES[node]
    page = (DOCS / f"{node}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    assert named(page, "Inputs") == [
        field.id for given in schema.inputs for field in list_fields(given)
    ]
    assert named(page, "Outputs") == [made.display_name or made.id for made in schema.outputs]
    assert "\n## Tip" in page


def test_there_is_no_page_without_a_node():
    assert {page.stem for page in DOCS.glob("*.md")} <= NODES.keys()
