"""Subject masks from keys that are made by hand, where the truth is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from retrieval_core.bank.encoding import select_tokens
from retrieval_core.training_free.subject_mask import find_subjects

SIZE = 64


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ellipse(x: float, y: float, width: float, height: float) -> torch.Tensor:
    """bool [S, S], centre and half axes in shares of the picture."""
    down, right = (torch.arange(SIZE) + 0.5)[:, None] / SIZE, (torch.arange(SIZE) + 0.5) / SIZE
    return ((right - x) / width) ** 2 + ((down - y) / height) ** 2 < 1


def paint(subject: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A picture [3, S, S]: red stripes on the subject, a blue gradient behind it."""
    down = (torch.arange(SIZE) / SIZE)[:, None].expand(SIZE, SIZE)
    stripes = (torch.arange(SIZE) // 4 % 2)[:, None].expand(SIZE, SIZE)
    behind = torch.stack([0.1 + 0.1 * down, 0.3 * down, 0.5 + 0.5 * down])
    front = torch.stack([0.7 + 0.2 * stripes, 0.2 * stripes, 0.1 * stripes])
    return torch.where(subject, front, behind)


def draw_keys(subject: torch.Tensor, size: int, seed: int = 0, dim: int = 32) -> torch.Tensor:
    """Keys and values [1, 2, N, D] of size x size tokens: mixtures of two directions, and noise."""
    covered = F.adaptive_avg_pool2d(subject[None].float(), size).flatten()[:, None]
    front, behind = rand(2, dim, seed=100 + seed)
    keys = covered * front + (1 - covered) * behind + 0.5 * rand(size**2, dim, seed=seed)
    return torch.stack([keys, rand(size**2, dim, seed=seed + 7)])[None]


def make_features(subject: torch.Tensor, sizes=(8, 16)):
    return {
        f"output_{i}.0@500": (draw_keys(subject, size, i), (size, size))
        for i, size in enumerate(sizes)
    }


def iou(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found & truth).sum() / (found | truth).sum())


@pytest.mark.parametrize(
    "subject",
    [
        ellipse(0.5, 0.5, 0.25, 0.35),
        ellipse(0.35, 0.6, 0.2, 0.25),
        ellipse(0.5, 0.9, 0.35, 0.6),  # a bust, which the lower edge cuts
    ],
)
def test_the_subject_is_found_to_the_pixel(subject):
    (found,) = find_subjects(make_features(subject), paint(subject)[None], [None])
    assert found.dtype == torch.bool and iou(found, subject) > 0.9


def test_each_reference_is_read_by_itself():
    subjects = ellipse(0.5, 0.5, 0.25, 0.35), ellipse(0.4, 0.6, 0.2, 0.3)
    alone = [
        find_subjects(make_features(subject), paint(subject)[None], [None])[0]
        for subject in subjects
    ]
    both = [make_features(subject) for subject in subjects]
    features = {
        site: (torch.cat([one[site][0] for one in both]), size)
        for site, (_, size) in both[0].items()
    }
    together = find_subjects(features, torch.stack([paint(s) for s in subjects]), [None, None])
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_padding_is_neither_subject_nor_background():
    subject, content = ellipse(0.5, 0.5, 0.15, 0.35), torch.zeros(SIZE, SIZE)
    content[:, 12:52] = 1
    features = make_features(subject)
    for keys, (height, width) in features.values():  # padding is unlike anything else
        padded = F.adaptive_avg_pool2d(content[None], (height, width)).flatten() < 0.5
        keys[:, :, padded] = 30.0
    picture = torch.where(content > 0, paint(subject), torch.tensor(0.5))
    (found,) = find_subjects(features, picture[None], [content])
    assert not found[content == 0].any() and iou(found, subject) > 0.85


def test_no_mask_where_nothing_stands_out():
    nothing = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    assert find_subjects(make_features(nothing), paint(nothing)[None], [None]) == [None]
    assert find_subjects(make_features(~nothing), paint(~nothing)[None], [None]) == [None]


@pytest.mark.parametrize("column", range(30, 34))
def test_a_picture_thinner_than_a_token_is_no_error(column):
    content = torch.zeros(SIZE, SIZE)
    content[:, column] = 1
    subject = ellipse(0.5, 0.5, 0.25, 0.35)
    (found,) = find_subjects(make_features(subject), paint(subject)[None], [content])
    assert found is None or not found[content == 0].any()


def test_the_decoder_is_asked_at_the_lowest_noise_level_and_not_at_every_size():
    subject = ellipse(0.5, 0.5, 0.25, 0.35)
    features = make_features(subject)
    (found,) = find_subjects(features, paint(subject)[None], [None])
    others = {
        "input_1.0@500": (rand(1, 2, 256, 32), (16, 16)),
        "output_0.0@900": (rand(1, 2, 64, 32), (8, 8)),
        "output_2.0@500": (rand(1, 2, 4096, 8), (64, 64)),
        "middle.0@500": (rand(1, 2, 16, 32), (4, 4)),
    }
    (again,) = find_subjects({**others, **features}, paint(subject)[None], [None])
    assert torch.equal(found, again)
    encoder = {site.replace("output", "input"): keys for site, keys in features.items()}
    assert find_subjects(encoder, paint(subject)[None], [None])[0] is not None


def test_tokens_at_the_edges_are_left_out_and_one_always_stays():
    mask = torch.zeros(2, 8, 8)
    mask[0, :5, :5] = 1  # of 2 x 2 tokens: one full, two covered by a quarter, one touched
    mask[1, 0, 0] = 1
    assert select_tokens(mask, 2, 2).tolist() == [
        [[True, True], [True, True]],
        [[True, False], [False, False]],
    ]
    alone = [[True, False], [False, False]]
    assert select_tokens(mask, 2, 2, 0.3).tolist() == [alone, alone]
    assert select_tokens(mask[0], 2, 2, 0.2).tolist() == [[True, True], [True, False]]
    assert not select_tokens(torch.zeros(8, 8), 2, 2, 0.3).any()
