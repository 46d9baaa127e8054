"""A small tokenizer and text encoder for the world's tags (poses, expressions, backgrounds)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import RetrievalError
from .world import BACKGROUNDS, EXPRESSIONS, POSES

CONCEPTS = ("figure", "face", "clothes")
LENGTH = 4
PAD = 0


def split_tags(prompt: str) -> list[str]:
    """The tags of a prompt, in lower case, with single spaces."""
    tags = [" ".join(tag.lower().replace("_", " ").split()) for tag in prompt.split(",")]
    return [tag for tag in tags if tag]


class Tokenizer:
    """One token per tag; a prompt is tags separated by commas, padded to `LENGTH` tokens.

    The order of the vocabulary is part of the trained weights: add at the end only.
    """

    def __init__(self) -> None:
        self.words = ("", *POSES, *EXPRESSIONS, *BACKGROUNDS, *CONCEPTS)
        self.ids = {word: i for i, word in enumerate(self.words)}

    def __call__(self, prompt: str) -> list[int]:
        """Token ids of one prompt.

        Raises:
            RetrievalError: a tag outside the vocabulary, or more than `LENGTH` tags.
        """
        tags = split_tags(prompt)
        unknown = [tag for tag in tags if tag not in self.ids]
        if unknown:
            raise RetrievalError(
                f"The paper-doll world does not know the tag {unknown[0]!r}; it knows the poses "
                f"{', '.join(POSES)}; the expressions {', '.join(EXPRESSIONS)}; and the "
                f"backgrounds {', '.join(BACKGROUNDS)}."
            )
        if len(tags) > LENGTH:
            raise RetrievalError(
                f"The prompt has {len(tags)} tags and the paper-doll world reads at most {LENGTH}; "
                "give one pose, one expression and one background."
            )
        ids = [self.ids[tag] for tag in tags]
        return ids + [PAD] * (LENGTH - len(ids))


class TextEncoder(nn.Module):
    """Token ids [B, L] to contexts [B, L, width]: an embedding and one transformer layer."""

    def __init__(self, width: int = 64, heads: int = 2):
        super().__init__()
        self.tokenizer = Tokenizer()
        self.embedding = nn.Embedding(len(self.tokenizer.words), width)
        self.layer = nn.TransformerEncoderLayer(
            width, heads, width * 2, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.layer(self.embedding(ids)))

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Contexts [B, L, width] of prompts; "" is the unconditional one."""
        device = self.embedding.weight.device
        return self(torch.tensor([self.tokenizer(p) for p in prompts], device=device))
