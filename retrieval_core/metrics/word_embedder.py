"""A text embedder without a model."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import Tensor


class WordEmbedder:
    """A `TextEmbedder` without a model: counts of a text's words, hashed to `width` places.

    The cosine distance of two texts is then the share of words that they do not have in common. It
    stands in for CLIP where nothing may be downloaded; it knows no synonyms, so its scores are
    comparable with no other encoder's.
    """

    def __init__(self, width: int = 4096) -> None:
        self.width = width

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        rows = torch.zeros(len(texts), self.width)
        for row, text in zip(rows, texts):
            for word in _words(text):
                row[_place(word, self.width)] += 1
        return rows


def _words(text: str) -> list[str]:
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return words or [text]  # punctuation alone is an answer, too


def _place(word: str, width: int) -> int:
    return int.from_bytes(sha256(word.encode()).digest()[:8], "big") % width
