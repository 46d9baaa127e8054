"""The one error class for what a user can cause, and others' errors in a few words."""

from __future__ import annotations

import re


class RetrievalError(ValueError):
    """A mistake the user can mend, told in one sentence: what was wrong and what to do."""


def explain(error: BaseException) -> str:
    """The first line of an error or of the error it wraps, shortened, without a full stop."""
    wrapped = getattr(error, "reason", None) or (error.args[0] if error.args else None)
    if isinstance(wrapped, BaseException):
        return explain(wrapped)
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"\.(?=\s)", ";", text)[:200].rstrip(".;: ")
