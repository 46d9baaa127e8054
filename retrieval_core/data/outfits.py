"""Tells the outfits of one character by one artist apart (§3.1), by answers or by the garment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from .annotating import Picture
from .concepts import cut_reference, find_clothes_region
from .sample import Sample

# The paper's question, word by word (§3.1).
QUESTION = "List top two colors of the character's cloths"

_COLOURS = (
    "navy blue", "sky blue", "royal blue", "hot pink", "off white",
    "black", "white", "gray", "grey", "silver", "red", "crimson", "scarlet", "maroon", "burgundy",
    "orange", "coral", "peach", "yellow", "golden", "gold", "cream", "ivory", "beige", "tan",
    "khaki", "brown", "green", "olive", "lime", "mint", "teal", "turquoise", "aqua", "cyan",
    "navy", "blue", "indigo", "purple", "violet", "lavender", "lilac", "magenta", "pink",
)  # fmt: skip
_NAMES = {name.replace(" ", ""): name for name in _COLOURS}  # an answer may write "sky-blue"
_NAMES |= {"grey": "gray", "golden": "gold", "navyblue": "navy", "violet": "purple"}
_SAME_SHADES = {"pale": "light", "deep": "dark"}
_COLOUR = re.compile(
    r"\b(?:(light|pale|dark|deep|bright|pastel)[ -]?)?"
    rf"({'|'.join(name.replace(' ', '[ -]?') for name in _COLOURS)})\b"
    # Not of the clothes: "black hair", "long black and white hair", "blue-eyed", "pale skin".
    r"(?![ -]*(?:(?:and|or) )?(?:\w+[ -])?(?:hair|eye[sd]|skin\b|background))"
)

# Longer side, in pixels, to which a garment is scaled, and the lattice in CIELAB on which its
# colours are counted: its step, lowest L, a and b, and number of nodes; it holds all of sRGB.
SIDE, STEP = 96, 25
_LOWEST, _NODES = (0, -100, -125), (5, 9, 10)
# Largest mean cosine distance to an outfit's other pictures; chosen on paper dolls.
THRESHOLD = 0.14
# Embeddings that are compared with each other at a time: 8 bytes for each pair of them.
BLOCK = 4096


def parse_colours(answer: str) -> tuple[str, ...] | None:
    """The first two different colours that an answer to `QUESTION` names, in its order.

    One where it names only one, None where it names none. Shades count ("light blue" is not
    "blue"); colours of hair, eyes, skin and background do not.
    """
    colours = []
    for shade, name in _COLOUR.findall(answer.lower()):
        shade, name = _SAME_SHADES.get(shade, shade), _NAMES[re.sub("[ -]", "", name)]
        colours.append(f"{shade} {name}".strip())
    return tuple(dict.fromkeys(colours))[:2] or None


def cluster_by_answers(answers: Sequence[str | None]) -> list[int]:
    """Outfit numbers by the paper's rule: the same colours in the same order are one outfit.

    Args:
        answers: to `QUESTION`, of one character by one artist.

    Returns:
        Numbers from 0 in the order of their first picture; -1 without an answer, or where it
        names no colour.
    """
    colours = [None if answer is None else parse_colours(answer) for answer in answers]
    return _number(colours)


def embed_garment(picture: Picture) -> np.ndarray | None:
    """Embeds the colours of the garment and where they are, without a model.

    Square roots of two histograms in CIELAB, of the upper and of the lower half of the figure
    below its head box, at length one: the cosine of two embeddings is the Bhattacharyya
    coefficient of the colours.

    Returns:
        float32 [900], or None without a mask or a head box, or where nothing lies below it.
    """
    found = _cut_garment(picture)
    if found is None:
        return None
    square, inside, upside_down = found
    rows, columns = np.nonzero(inside)
    height = (rows - rows[0]) / max(rows[-1] - rows[0], 1)
    if upside_down:
        height = 1 - height
    lower = np.clip(2 * height - 0.5, 0, 1)  # the halves overlap: poses move the waist
    counts = np.zeros((2, np.prod(_NODES)))
    steps = (_convert_to_lab(square)[rows, columns] - _LOWEST) / STEP
    first = np.floor(steps).astype(np.intp)
    rest = steps - first
    for corner in np.ndindex(2, 2, 2):  # linear in each axis, so that no colour lies on an edge
        node = np.ravel_multi_index((first + corner).T, _NODES, mode="clip")
        weight = np.where(corner, rest, 1 - rest).prod(1)
        counts[0] += np.bincount(node, weight * (1 - lower), counts.shape[1])
        counts[1] += np.bincount(node, weight * lower, counts.shape[1])
    embedding = np.sqrt(counts.ravel())
    return (embedding / np.linalg.norm(embedding)).astype(np.float32)


def _cut_garment(picture: Picture) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """The garment as a square uint8 [S, S, 3], its mask bool [S, S], and whether it is upside down.

    None without a mask or a head box, or where the region of the clothes shows no figure.
    """
    if picture.mask is None or picture.head_box is None:
        return None
    sample = Sample(picture.image, picture.mask, picture.head_box)
    region = find_clothes_region(sample)
    x0, y0, x1, y1 = region.content
    shown = np.zeros_like(picture.mask)
    shown[y0:y1, x0:x1] = picture.mask[y0:y1, x0:x1]
    if region.blank is not None:
        x0, y0, x1, y1 = region.blank
        shown[y0:y1, x0:x1] = False
    rows = np.nonzero(shown)[0]
    if not len(rows):
        return None
    reference = cut_reference(sample, "clothes", SIDE, remove_background=True)
    head = (sample.head_box[1] + sample.head_box[3]) / 2
    inside = np.ones((SIDE, SIDE), bool) if reference.mask is None else reference.mask
    return reference.image, inside, head > rows.mean()


def cluster_by_garments(embeddings: Sequence[np.ndarray | Sequence[float] | None]) -> list[int]:
    """Outfit numbers by average linkage on the cosine distances of the garments' embeddings.

    Groups beyond `BLOCK` are clustered a block at a time; an outfit of an earlier block takes what
    average linkage would add to it.

    Args:
        embeddings: of one character by one artist.

    Returns:
        Numbers from 0 in the order of their first picture; -1 without an embedding.
    """
    known = [i for i, embedding in enumerate(embeddings) if embedding is not None]
    labels: list[int | None] = [None] * len(embeddings)
    if known:
        vectors = np.array([embeddings[i] for i in known], np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        for i, label in zip(known, _cluster(vectors)):
            labels[i] = label
    return _number(labels)


def _cluster(vectors: np.ndarray) -> list[int]:
    """Labels of unit vectors [N, D]."""
    from sklearn.cluster import AgglomerativeClustering

    linkage = AgglomerativeClustering(
        n_clusters=None, distance_threshold=THRESHOLD, metric="cosine", linkage="average"
    )
    labels, count = np.full(len(vectors), -1), 0
    left = np.arange(len(vectors))
    while len(left):
        block, left = left[:BLOCK], left[BLOCK:]
        found = linkage.fit_predict(vectors[block]) if len(block) > 1 else np.zeros(1, np.intp)
        labels[block] = found + count
        # The mean of distances to a cluster is the distance to its mean, since all have length one.
        means = np.stack([vectors[block[found == i]].mean(0) for i in range(found.max() + 1)])
        similarity = vectors[left] @ means.T
        near = similarity.max(1, initial=-1) >= 1 - THRESHOLD
        labels[left[near]] = similarity[near].argmax(1) + count
        left = left[~near]
        count += len(means)
    return labels.tolist()


def _number(labels: Sequence[Any]) -> list[int]:
    """Labels as numbers in the order of their first appearance; None as -1."""
    numbers: dict[Any, int] = {}
    return [-1 if label is None else numbers.setdefault(label, len(numbers)) for label in labels]


def _convert_to_lab(image: np.ndarray) -> np.ndarray:
    """CIELAB, float64 [H, W, 3] with L in 0..100, of sRGB uint8 [H, W, 3]."""
    lab = np.array(ImageCms.applyTransform(Image.fromarray(image), _make_lab_transform()))
    return np.concatenate([lab[..., :1] * (100 / 255), lab[..., 1:].view(np.int8)], -1)


@lru_cache
def _make_lab_transform() -> Any:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.buildTransform(*profiles, "RGB", "LAB")
