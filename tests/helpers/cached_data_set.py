"""A small data set on disk, and a base whose VAE and text encoder can be checked by hand."""

import hashlib

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image

from retrieval_core.data import open_data_set
from retrieval_core.data.data_set import write_data_set
from retrieval_core.training.run_config import RunConfig

SIZE = 64
# Character, artist, outfit, has a head box, has a mask. Row i is grey of level 20 i + 10. Rows 0 to
# 3 and 4, 5 are outfits of ann by bob; the others are alone.
ROWS = [
    ("ann", "bob", 0, False, True), ("ann", "bob", 0, True, False), ("ann", "bob", 0, True, True),
    ("ann", "bob", 0, True, False), ("ann", "bob", 1, True, False), ("ann", "bob", 1, True, True),
    ("ann", "eve", 0, True, False), ("cid", "bob", 0, True, False), ("ann", "bob", -1, True, False),
]  # fmt: skip


def write_pictures(folder, rows=ROWS, labelled=()):
    """A data set of `SIZE` x `SIZE` pictures whose masks are their left halves.

    Those numbered in `labelled` have part labels too: 3 on the left half.
    """
    made = []
    for i, (character, artist, outfit, head, masked) in enumerate(rows):
        path, mask = folder / f"{i}.png", folder / f"{i}.mask.png"
        Image.new("RGB", (SIZE, SIZE), (20 * i + 10,) * 3).save(path)
        if masked:
            levels = np.zeros((SIZE, SIZE), np.uint8)
            levels[:, : SIZE // 2] = 255
            Image.fromarray(levels).save(mask)
        parts = folder / f"{i}.parts.png"
        if i in labelled:
            levels = np.zeros((SIZE, SIZE), np.uint8)
            levels[:, : SIZE // 2] = 3
            Image.fromarray(levels).save(parts)
        made.append(
            {
                "root": str(folder),
                "image": path.name,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "width": SIZE,
                "height": SIZE,
                "character": character,
                "artist": artist,
                "outfit": outfit,
                "tags": [f"tag_{i}"],
                "head_box": [16, 0, 48, 32] if head else None,
                "mask": str(mask) if masked else None,
                "parts": str(parts) if i in labelled else None,
                "source": "folders",
            }
        )
    write_data_set(folder / "set", pa.Table.from_pylist(made), {})
    return open_data_set(folder / "set")


class AverageVae:
    """Latents are averages of 8 x 8 pixels, of red, green, blue and all."""

    def __init__(self):
        self.encoded = 0

    def encode(self, pixels):
        self.encoded += len(pixels)
        return F.avg_pool2d(torch.cat([pixels, pixels.mean(1, keepdim=True)], 1), 8)


class FakeBase:
    """As much of `Base` as the cache needs.

    Prompts have the SHA-256 of their text as context; with `width`, as vector conditioning, too.
    """

    name, fingerprint, channel_weights = "sd15", "ab" * 32, None

    def __init__(self, width=None):
        self.vae, self.width = AverageVae(), width

    def encode_prompts(self, texts, sizes):
        context = torch.stack([embed_text(text) for text in texts])
        return context, None if self.width is None else context[:, 0, : self.width]


def embed_text(text):
    """[4, 8], distinct for each text and exact in float16."""
    return torch.tensor(list(hashlib.sha256(text.encode()).digest())).view(4, 8).float()


def configure(folder, **changes):
    values = {
        "base": folder / "none.safetensors",
        "data": folder / "set",
        "out": folder / "run",
        "cache": folder / "cache",
        "size": SIZE,
        "task": "both",
        "steps": 100,
        "warmup_steps": 0,
        "batch_size": 2,
        "views": 2,
        "workers": 0,
        "seed": 3,
    }
    return RunConfig(**{**values, **changes})
