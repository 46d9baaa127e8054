"""The paper-doll world as a measure: its truth and its judge answer, and attributes are matched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from ..errors import RetrievalError
from ..metrics.similarity import ImageScore
from ..metrics.statistics import bootstrap
from .judge import FACE, GARMENTS, Judge, list_truth, matches
from .world import Figure

# A question with one of these words is about that alone; any other asks for a description.
TOPICS = ("pose", "background", "expression", "hair", "eyes", "clothes")


def describe(reading: Mapping[str, str], question: str) -> str:
    """What `reading` (attribute -> value, as the judge's) answers to a question, in words."""
    r = reading
    sentences = {
        "pose": f"the pose is {r['pose']}",
        "background": f"the background is {r['background']}",
        "expression": f"the expression is {r['expression']}",
        "hair": f"the hair is {r['hair colour']} {r['hair style']}",
        "eyes": f"the eyes are {r['eye colour']}",
        "clothes": f"the clothes are {r['upper colour']} {r['upper']} and {r['lower colour']} "
        f"{r['lower']}",
    }
    topics = [topic for topic in TOPICS if topic in question.lower()] or list(TOPICS)
    return ", ".join(sentences[topic] for topic in topics)


class TruthAnswerer:
    """An `Answerer` that knows the figures which the images show, in their order."""

    def __init__(self, figures: Sequence[Figure]) -> None:
        self.readings = [list_truth(figure) for figure in figures]

    def answer(self, images: Tensor, question: str) -> list[str]:
        if len(images) != len(self.readings):
            raise RetrievalError(
                f"There are {len(images)} images and the truth of {len(self.readings)} figures is "
                "known; give the images that were drawn of them."
            )
        return [describe(reading, question) for reading in self.readings]


class JudgeAnswerer:
    """An `Answerer` that reads generated figures [N, 3, 64, 64] with the bundled judge."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def answer(self, images: Tensor, question: str) -> list[str]:
        return [describe(reading, question) for reading in self.judge.read(images)]


def match_attributes(
    read: Sequence[Mapping[str, str]],
    wanted: Sequence[Mapping[str, str]],
    attributes: tuple[str, ...] = (*FACE, *GARMENTS),
) -> ImageScore:
    """Share of attributes in each figure that are those of its references, in percent.

    Args:
        read: one reading a figure (`Judge.read`). wanted: what its references show
            (`paperdoll.cases.Case.wanted`), one for all or one each.

    Raises:
        RetrievalError: no figure, or another number of figures than of wanted attributes.
    """
    if len(wanted) == 1:
        wanted = [wanted[0]] * len(read)
    if len(read) != len(wanted) or not len(read):
        raise RetrievalError(
            f"There are {len(read)} figures and the wanted attributes of {len(wanted)}; give those "
            "of one character for all, or one each."
        )
    values = [100 * np.mean(matches(r, w, attributes)) for r, w in zip(read, wanted)]
    return ImageScore(np.array(values), bootstrap(values))
