"""CLIP-I, CLIP-T and DINO-I against plain formulations and against torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from refusal import sentence

from retrieval_core.metrics.similarity import image_similarity, similarity, text_similarity


class Encoder:
    """Embeds a picture as its mean colour, and a text as the colour it names."""

    colours = {"red": (1.0, 0.0, 0.0), "grey": (1.0, 1.0, 1.0), "dark": (-1.0, -1.0, -1.0)}  # noqa: RUF012

    def embed_images(self, images):
        return images.mean((2, 3))

    def embed_texts(self, texts):
        return torch.tensor([self.colours[text] for text in texts])


def cosine(u, v) -> float:
    product = math.fsum(a * b for a, b in zip(u, v))
    return 100 * product / math.sqrt(math.fsum(a * a for a in u) * math.fsum(b * b for b in v))


def rows(count, width=6, seed=0):
    return np.random.default_rng(seed).normal(0.2, 1, (count, width))


def pictures(count, seed=0, size=(8, 6)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def test_similarity_is_the_mean_cosine_with_each():
    a, b = rows(5), rows(9, seed=1)
    expected = [np.mean([cosine(u, v) for v in b.tolist()]) for u in a.tolist()]
    np.testing.assert_allclose(similarity(a, b), expected, atol=1e-6)
    assert similarity(a, -a[:1])[0] == pytest.approx(-100)


def test_scores_of_images():
    images, references = pictures(4), [pictures(1, 1)[0], pictures(1, 2, (16, 16))[0]]
    found = image_similarity(images, references, Encoder())
    means = images.double().mean((2, 3)).tolist()
    theirs = [r.double().mean((1, 2)).tolist() for r in references]
    expected = [np.mean([cosine(m, t) for t in theirs]) for m in means]
    np.testing.assert_allclose(found.values, expected, atol=1e-4)
    assert found.estimate.mean == pytest.approx(np.mean(expected), abs=1e-4)
    assert found.estimate.standard_error == pytest.approx(np.std(expected, ddof=1) / 2, abs=1e-4)
    # A picture is as like itself as can be, and their order does not matter.
    assert image_similarity(images[:1], images[:1], Encoder()).values == pytest.approx([100])
    turned = image_similarity(images.flip(0), references[::-1], Encoder())
    np.testing.assert_allclose(turned.values[::-1], found.values, atol=1e-9)


def test_scores_of_text():
    images = pictures(3)
    means = images.double().mean((2, 3)).tolist()
    one = text_similarity(images, "red", Encoder())
    np.testing.assert_allclose(one.values, [cosine(m, (1, 0, 0)) for m in means], atol=1e-4)
    each = text_similarity(images, ["red", "dark", "red"], Encoder()).values
    assert each[0] == one.values[0] and each[2] == one.values[2]
    assert each[1] == pytest.approx(cosine(means[1], (-1, -1, -1)), abs=1e-4)


def test_cosines_agree_with_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional")
    a, b = torch.tensor(rows(8)), torch.tensor(rows(5, seed=3))
    theirs = 100 * functional.pairwise_cosine_similarity(a, b)
    np.testing.assert_allclose(similarity(a, b), theirs.mean(1), atol=1e-6)
    from retrieval_core.metrics.diversity import compute_distance_matrix, diversity

    distances = 100 - 100 * functional.pairwise_cosine_similarity(a)  # its diagonal is set to 0
    distances.fill_diagonal_(0)
    np.testing.assert_allclose(compute_distance_matrix(a), distances, atol=1e-6)
    assert diversity(a).mean == pytest.approx(float(distances.sum()) / (8 * 7), abs=1e-6)


def test_clip_scores_agree_with_torchmetrics(tmp_path):
    multimodal = pytest.importorskip("torchmetrics.functional.multimodal")
    transformers = pytest.importorskip("transformers")
    from tiny_models import make_clip

    from retrieval_core.metrics.encoders import load_clip

    folder = make_clip(tmp_path)
    clip = load_clip(folder)

    def theirs():
        model = transformers.CLIPModel.from_pretrained(folder)
        return model, transformers.CLIPProcessor.from_pretrained(folder)

    pixels = (pictures(4, 5, (40, 48)) * 255).round().byte()
    images, texts = pixels.float() / 255, ["the cat", "a red sofa", "standing", "the pose"]
    with torch.no_grad():
        scores = [float(multimodal.clip_score([p], [t], theirs)) for p, t in zip(pixels, texts)]
        like = [float(multimodal.clip_score([p], [pixels[0]], theirs)) for p in pixels]
    found = text_similarity(images, texts, clip).values
    assert found.std() > 1  # or agreement would say little
    np.testing.assert_allclose(found.clip(0), scores, atol=1e-3)
    np.testing.assert_allclose(image_similarity(images, images[:1], clip).values, like, atol=1e-3)


def test_another_number_of_prompts_than_images():
    message = sentence(text_similarity, pictures(2), ["red"] * 3, Encoder())
    assert "2 images and 3 prompts" in message
