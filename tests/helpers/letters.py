"""A stage's function that other processes can import."""

from __future__ import annotations

import pyarrow as pa

from retrieval_core.errors import RetrievalError


def count_letters(chunk: str) -> tuple[pa.Table, dict[str, int]]:
    if chunk == "wrong":
        raise RetrievalError("The chunk is 'wrong'; give another.")
    if chunk == "broken":
        raise ZeroDivisionError("division by zero")
    return pa.table({"letters": [len(chunk)]}), {"vowels": 1}
