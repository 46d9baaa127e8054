"""Benchmarks that print ratios; `python -m tests.benchmarks.step_cost` is the command."""
