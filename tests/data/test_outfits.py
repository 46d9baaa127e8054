"""Outfits: colours read from answers, garments embedded, both clustered."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval_core.data import outfits
from retrieval_core.data.annotating import Picture
from retrieval_core.data.outfits import (
    cluster_by_answers,
    cluster_by_garments,
    embed_garment,
    parse_colours,
)
from retrieval_core.paperdoll.draw import render
from retrieval_core.paperdoll.world import Figure, random_identity, random_outfit, random_scene

ANSWERS = {
    "black and white": ("black", "white"),
    "White, Black.": ("white", "black"),
    "The top two colors of the character's clothes are black and white.": ("black", "white"),
    "1. Red\n2. navy-blue": ("red", "navy"),
    "the black and pink outfit has white and red accents": ("black", "pink"),
    "light blue and pale pink": ("light blue", "light pink"),
    "dark-blue/skyblue": ("dark blue", "sky blue"),
    "Grey & golden": ("gray", "gold"),
    "black, black and red": ("black", "red"),
    "pink": ("pink",),
    "blue-eyed girl with long black hair in a white dress": ("white",),
    "navy blue hair, brown skin, green background": None,
    "black skinny jeans and a tan coat": ("black", "tan"),
    "a reddish multicolored pattern": None,
    "I cannot tell.": None,
    "": None,
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_colours_are_read_from_real_answers(answer):
    assert parse_colours(answer) == ANSWERS[answer]


def test_answers_cluster_by_the_exact_ordered_pair():
    answers = ["black and pink", None, "pink and black", "Black, pink!", "no idea", "black"]
    assert cluster_by_answers(answers) == [0, -1, 1, 0, -1, 2]
    assert cluster_by_answers([]) == []


def test_garments_cluster_by_angle_and_number_by_first_appearance():
    a, b, near_a = [3.0, 0, 0], [0, 0.2, 0], [1.0, 0.1, 0]
    assert cluster_by_garments([None, b, a, near_a, None, b]) == [-1, 0, 1, 1, -1, 0]
    assert cluster_by_garments([None, None]) == [-1, -1]
    assert cluster_by_garments([a]) == [0] and cluster_by_garments([]) == []


def test_a_garments_embedding_sees_nothing_but_the_garment():
    """Neither the background nor the head, and it has length one."""
    rng = np.random.default_rng(0)
    figure = Figure(random_identity(rng), random_outfit(rng), random_scene(rng))
    doll = render(figure)
    first = embed_garment(Picture(doll.image, "", doll.mask, doll.head_box))
    assert first.dtype == np.float32 and np.linalg.norm(first) == pytest.approx(1, abs=1e-6)
    chin = doll.head_box[3]
    hidden = ~doll.mask
    hidden[:chin] = True
    painted = np.where(hidden[..., None], rng.integers(0, 256, doll.image.shape), doll.image)
    again = embed_garment(Picture(painted.astype(np.uint8), "", doll.mask, doll.head_box))
    # Scaling blends a pixel's width of it in at the edges of the garment.
    assert first @ again > 1 - outfits.THRESHOLD / 4
    assert embed_garment(Picture(doll.image, "", doll.mask)) is None
    assert embed_garment(Picture(doll.image, "", head_box=doll.head_box)) is None
    head_only = doll.mask.copy()
    head_only[chin:] = False
    assert embed_garment(Picture(doll.image, "", head_only, doll.head_box)) is None


def test_colours_swapped_between_upper_and_lower_garment_are_another_outfit():
    image = np.zeros((90, 40, 3), np.uint8)
    image[30:60], image[60:] = (200, 30, 30), (30, 30, 200)
    mask, head = np.zeros((90, 40), bool), (10, 0, 30, 30)
    mask[:30, 10:30] = mask[30:] = True
    swapped = image.copy()
    swapped[30:60], swapped[60:] = image[60:], image[30:60]
    upright = embed_garment(Picture(image, "", mask, head))
    assert cluster_by_garments([upright, embed_garment(Picture(swapped, "", mask, head))]) == [0, 1]
    # A figure on its head shows the same garments in the other order.
    turned = Picture(image[::-1].copy(), "", mask[::-1].copy(), (10, 60, 30, 90))
    assert cluster_by_garments([upright, embed_garment(turned)]) == [0, 0]


def draw_dolls(seed: int, characters: int):
    """For each character embeddings, true outfits, and the answers of a perfect answerer."""
    rng = np.random.default_rng(seed)
    for _ in range(characters):
        who = random_identity(rng)
        clothes = {}
        for _ in range(int(rng.integers(1, 6))):  # outfits differ in their colours
            one = random_outfit(rng)
            clothes[one.upper_colour, one.lower_colour] = one
        truth, embeddings, answers = [], [], []
        for number, one in enumerate(clothes.values()):
            for _ in range(int(rng.integers(3, 12))):
                doll = render(Figure(who, one, random_scene(rng)))
                truth.append(number)
                embeddings.append(embed_garment(Picture(doll.image, "", doll.mask, doll.head_box)))
                answers.append(f"{one.upper_colour} and {one.lower_colour}")
        yield truth, embeddings, answers


def score(found, truth):
    """Pairs together in both, in the clusters, in the truth."""
    found, truth = np.array(found), np.array(truth)
    pairs = np.triu(np.ones((len(truth), len(truth)), bool), 1)
    together = (found[:, None] == found) & (found[:, None] >= 0) & pairs
    same = (truth[:, None] == truth) & pairs
    return np.array([(together & same).sum(), together.sum(), same.sum()])


def test_outfits_of_paper_dolls_are_recovered():
    """Not on the dolls on which the threshold was chosen."""
    garments, answers = np.zeros(3), np.zeros(3)
    for truth, embeddings, said in draw_dolls(11, 20):
        garments += score(cluster_by_garments(embeddings), truth)
        answers += score(cluster_by_answers(said), truth)
    assert answers[0] == answers[1] == answers[2]
    both, together, same = garments
    assert both / together >= 0.99 and both / same >= 0.9, (both / together, both / same)


def test_large_groups_are_clustered_in_blocks(monkeypatch):
    rng = np.random.default_rng(2)
    centres = np.eye(8)
    truth = rng.integers(0, 8, 300)
    vectors = centres[truth] + rng.normal(0, 0.03, (300, 8))
    whole = cluster_by_garments(list(vectors))
    assert score(whole, truth).tolist() == [score(truth, truth)[0]] * 3
    monkeypatch.setattr(outfits, "BLOCK", 5)  # the first block lacks some of the outfits
    assert cluster_by_garments(list(vectors)) == whole
