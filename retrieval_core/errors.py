"""The one error class for what a user can cause, and how it and others' errors are told."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from types import ModuleType


class RetrievalError(ValueError):
    """A mistake the user can mend, told in one sentence: what was wrong and what to do."""


def explain(error: BaseException) -> str:
    """The first line of an error or of the error it wraps, shortened, without a full stop."""
    wrapped = getattr(error, "reason", None) or (error.args[0] if error.args else None)
    if isinstance(wrapped, BaseException):
        return explain(wrapped)
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"\.(?=\s)", ";", text)[:200].rstrip(".;: ")


def run_command(work: Callable[[], int | None]) -> int:
    """Runs a command that can be resumed; its exit status is what `work` returns, or 0.

    A RetrievalError and Ctrl-C are told in one sentence.
    """
    try:
        return work() or 0
    except RetrievalError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        return 130


# The pack's extra packages (pyproject.toml) -> what they are for.
_NEEDED_BY = {"data": "Data sets need", "train": "Training needs"}


def import_library(name: str, extra: str) -> ModuleType:
    """Imports a package of one of the pack's extras, `data` or `train`.

    Raises:
        RetrievalError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RetrievalError(
            f"{_NEEDED_BY[extra]} the package {name.partition('.')[0]} ({error}); install the "
            f"pack's extra packages, 'pip install .[{extra}]' in its folder."
        ) from error
