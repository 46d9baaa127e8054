"""Writes the nodes as they are now to released_nodes.json, if that breaks no saved workflow.

    python -m pytest tests/host/record_released.py

Not collected by default.
"""

from __future__ import annotations

from released import describe_nodes, find_breaks, read_released, write_released


def test_record():
    now = describe_nodes()
    assert not find_breaks(read_released(), now)
    write_released(now)
