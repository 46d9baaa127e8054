"""The judge: classifies the attributes of generated figures from their pixels.

A small convolutional classifier with one head per attribute, trained on rendered figures with
blur, noise and the VAE's reconstruction error. It sees neither prompts nor references. Its error on
known truth is tested and printed with every measurement. It is least accurate on a garment's
pattern, one or two pixels wide, which no line of the measurement uses.
"""

from __future__ import annotations

import os
from dataclasses import astuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import check_format, read_safetensors, save_safetensors
from ..network.unet import load_strictly
from . import world

FORMAT = "paperdoll_judge"

Attributes = dict[str, str]  # attribute -> value, of one figure

# attribute -> its values, in the order of the head's outputs (part of the trained weights). The
# attributes are in the order of the fields of `Figure`.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "hair style": world.HAIR_STYLES,
    "hair colour": tuple(world.HAIR_COLOURS),
    "eye colour": tuple(world.EYE_COLOURS),
    "skin": tuple(world.SKIN_TONES),
    "upper": world.UPPER_KINDS,
    "upper colour": tuple(world.GARMENT_COLOURS),
    "upper pattern": world.PATTERNS,
    "lower": world.LOWER_KINDS,
    "lower colour": tuple(world.GARMENT_COLOURS),
    "pose": world.POSES,
    "expression": world.EXPRESSIONS,
    "background": world.BACKGROUNDS,
    "mirrored": ("no", "yes"),
}
FACE = ("hair style", "hair colour", "eye colour")
GARMENTS = ("upper", "upper colour", "lower", "lower colour")
SCENE = ("pose", "expression", "background")
BATCH = 256


def list_truth(figure: world.Figure) -> Attributes:
    """The true attributes of a figure, named as in `ATTRIBUTES`."""
    scene, mirrored = figure.scene.tags(), "yes" if figure.scene.mirror else "no"
    values = (*astuple(figure.identity), *astuple(figure.outfit), *scene, mirrored)
    return dict(zip(ATTRIBUTES, values, strict=True))


def index_truth(figure: world.Figure) -> list[int]:
    """`list_truth` as the index of each value, in the order of `ATTRIBUTES`."""
    values = list_truth(figure)
    return [names.index(values[attribute]) for attribute, names in ATTRIBUTES.items()]


class Judge(nn.Module):
    """Logits of every attribute for images [B, 3, 64, 64] in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Conv2d(before, after, 3, padding=1, stride=2, bias=False)]
            layers += [nn.GroupNorm(8, after), nn.SiLU()]
        self.features = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(widths[-1] * 16, 192), nn.SiLU()
        )
        self.heads = nn.ModuleList(nn.Linear(192, len(v)) for v in ATTRIBUTES.values())

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.features(images * 2 - 1)
        return [head(features) for head in self.heads]

    def loss(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Mean cross-entropy over the attributes on (images, ids [B, A]), images disturbed."""
        images, ids = batch
        logits = self(disturb(images, generator))
        losses = [F.cross_entropy(logit, ids[:, i]) for i, logit in enumerate(logits)]
        return {"loss": torch.stack(losses).mean()}

    @torch.inference_mode()
    def read(self, images: Tensor) -> list[Attributes]:
        """The most likely value of every attribute, one dict per image."""
        indices = [
            torch.stack([logits.argmax(1) for logits in self(batch)], 1)
            for batch in images.split(BATCH)
        ]
        return [
            {name: values[i] for (name, values), i in zip(ATTRIBUTES.items(), row, strict=True)}
            for row in torch.cat(indices).tolist()
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        tensors = {k: v.half() for k, v in self.state_dict().items()}
        save_safetensors(path, tensors, {"format": FORMAT})


def disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Imitates a generator's errors: blurs some images, adds noise and a brightness gain to all."""
    count = images.shape[0]
    kernel = torch.tensor([0.25, 0.5, 0.25])
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    share = torch.rand(count, 1, 1, 1, generator=generator)
    images = torch.lerp(images, blurred, share * (share > 0.3))
    level = 0.05 * torch.rand(count, 1, 1, 1, generator=generator)
    images = images + level * torch.randn(images.shape, generator=generator)
    gain = 1 + 0.06 * (2 * torch.rand(count, 1, 1, 1, generator=generator) - 1)
    return (images * gain).clamp(0, 1)


def load_judge(path: str | os.PathLike[str]) -> Judge:
    """Reads a judge's file; RetrievalError if the format is another."""
    tensors, metadata = read_safetensors(path)
    check_format(path, metadata, FORMAT, "use the judge bundled with the pack")
    judge = Judge()
    load_strictly(judge, {k: v.float() for k, v in tensors.items()}, f"judge '{path}'")
    return judge.eval().requires_grad_(False)


def compute_chance(attribute: str) -> float:
    """The accuracy of guessing."""
    return 1 / len(ATTRIBUTES[attribute])
