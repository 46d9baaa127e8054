"""Benchmarks that print ratios; `python -m tests.benchmarks.step_cost` is the command."""

from tests.helpers.dynamic_vram import load_library

load_library()
