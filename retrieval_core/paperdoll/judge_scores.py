"""Scores of paper-doll figures by the judge: answers to questions, and attribute match."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..metrics.similarity import ImageScore
from .judge import FACE, GARMENTS, Attributes, Judge


def describe(attributes: Attributes, question: str) -> str:
    """Answers a question about the topics that it names, or about all if it names none."""
    a = attributes
    sentences = {
        "pose": f"the pose is {a['pose']}",
        "background": f"the background is {a['background']}",
        "expression": f"the expression is {a['expression']}",
        "hair": f"the hair is {a['hair colour']} {a['hair style']}",
        "eyes": f"the eyes are {a['eye colour']}",
        "clothes": f"the clothes are {a['upper colour']} {a['upper']} and {a['lower colour']} "
        f"{a['lower']}",
    }
    topics = [topic for topic in sentences if topic in question.lower()] or list(sentences)
    return ", ".join(sentences[topic] for topic in topics)


class JudgeAnswerer:
    """An `Answerer` for generated figures [N, 3, 64, 64], by the judge's attributes."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def answer(self, images: Tensor, question: str) -> list[str]:
        return [describe(attributes, question) for attributes in self.judge.read(images)]


def match_attributes(
    found: Sequence[Attributes],
    wanted: Attributes,
    names: tuple[str, ...] = (*FACE, *GARMENTS),
) -> ImageScore:
    """Percentage of the named attributes that equal `wanted`'s, for each of one or more figures."""
    values = [100 * np.mean([f[name] == wanted[name] for name in names]) for f in found]
    return ImageScore(np.array(values))
