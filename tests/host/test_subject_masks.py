"""Encode References finds the subjects of pictures without a mask, in the training-free mode."""

from __future__ import annotations

import pytest
import torch
from making import sample
from retrieval_pack.nodes.encode_references import AUTOMATIC, OFF, RetrievalEncodeReferences
from retrieval_pack.nodes.host.apply import apply_references
from retrieval_pack.nodes.host.paperdoll_host import draw_references, find_demo_network, load_demo
from retrieval_pack.nodes.host.trained_network import load_network
from retrieval_pack.nodes.host.training_free_model import use_training_free

CHARACTER, COUNT = 3, 4


@pytest.fixture(scope="module")
def demo():
    """The bundled model, CLIP and VAE, and a latent."""
    return load_demo(1, 1)


@pytest.fixture(scope="module")
def net(demo):
    return use_training_free(demo[0])


@pytest.fixture(scope="module")
def pictures():
    """Figures with a background [4, 64, 64, 3], and their true masks."""
    images, masks, _ = draw_references(CHARACTER, "figure", COUNT)
    return images, masks


def encode(net, demo, images, **more):
    """The node's references, masks and what its preview shows."""
    _, clip, vae, _ = demo
    out = RetrievalEncodeReferences.execute(
        net, images, vae, clip, {"concept": "figure"}, 1.0, **more
    )
    references, masks = out.args
    return references.encoded, masks, out.ui["retrieval_references"]


def count(reference):
    return next(iter(reference.tokens.values())).shape[1]


def test_the_subject_is_found_by_default_shown_and_given_as_a_mask(net, demo, pictures):
    images, truths = pictures
    encoded, masks, shown = encode(net, demo, images)
    assert masks.shape == truths.shape and masks.dtype == torch.float32
    found, true = masks > 0.5, truths > 0.5
    iou = (found & true).sum((1, 2)) / (found | true).sum((1, 2))
    assert iou.mean() > 0.7, iou  # of hundreds of figures on average above 0.85
    for reference, one in zip(encoded, shown, strict=True):
        assert 0 < one["kept"] < 1
        grey = (reference.thumbnail.int() - 127).abs().amax(-1) <= 1
        assert grey[~(reference.mask > 0)].all()


def test_off_takes_all_of_the_picture(net, demo, pictures):
    encoded, masks, shown = encode(net, demo, pictures[0], subject_mask=OFF)
    assert torch.equal(masks, torch.ones(COUNT, 64, 64))
    assert all(one["kept"] == 1 for one in shown)
    automatic, *_ = encode(net, demo, pictures[0], subject_mask=AUTOMATIC)
    assert all(count(a) < count(b) for a, b in zip(automatic, encoded, strict=True))


def test_a_mask_that_is_connected_is_used_as_it_is(net, demo, pictures):
    images, truths = pictures
    given, masks, _ = encode(net, demo, images, mask=truths)
    off, *_ = encode(net, demo, images, mask=truths, subject_mask=OFF)
    assert torch.equal(masks, truths)
    for one, other in zip(given, off, strict=True):
        assert all(torch.equal(one.tokens[site], other.tokens[site]) for site in one.tokens)


def test_a_subject_found_is_encoded_as_one_whose_mask_is_given(net, demo, pictures):
    images, _ = pictures
    found, masks, _ = encode(net, demo, images)
    given, *_ = encode(net, demo, images, mask=masks)
    for one, other in zip(found, given, strict=True):
        assert torch.equal(one.thumbnail, other.thumbnail)
        assert 0.6 * count(other) < count(one) <= count(other)  # without those of its edges


def test_load_images_placeholder_mask_is_none(net, demo, pictures):
    placeholder = torch.zeros(1, 64, 64)
    _, masks, _ = encode(net, demo, pictures[0], mask=placeholder, mask_marks="background")
    assert 0 < masks.mean() < 1


def test_masks_have_the_size_of_pictures_that_are_not_square(net, demo, pictures):
    images = pictures[0][:, :, 8:56].repeat_interleave(2, 1).repeat_interleave(2, 2)
    encoded, masks, _ = encode(net, demo, images)
    assert masks.shape == (COUNT, 128, 96)
    assert all(reference.mask.shape == (64, 64) for reference in encoded)
    _, ones, _ = encode(net, demo, images, subject_mask=OFF)
    assert (ones == 1).all()  # the padding is no part of the picture
    _, same, _ = encode(net, demo, images, mask=masks)
    assert (same.round() == masks.round()).float().mean() > 0.98


def test_a_picture_without_a_subject_is_taken_whole(net, demo):
    plain = torch.full((2, 64, 64, 3), 0.4)
    plain[1] = torch.linspace(0, 1, 64)[:, None, None]
    _, masks, shown = encode(net, demo, plain)
    assert (masks == 1).all() and all(one["kept"] == 1 for one in shown)


def test_a_trained_network_takes_all_of_the_picture(demo, pictures):
    network = load_network(find_demo_network(), demo[0])
    _, masks, shown = encode(network, demo, pictures[0])
    assert (masks == 1).all() and all(one["kept"] == 1 for one in shown)


def test_strength_zero_is_the_base_model_bit_for_bit(net, demo, pictures):
    from retrieval_pack.nodes.host.encoded_references import References

    model, clip, _, latent = demo
    encoded, *_ = encode(net, demo, pictures[0])
    words = [[clip.encode_from_tokens(clip.tokenize("standing, smile, beach")), {}]]
    nothing = [[clip.encode_from_tokens(clip.tokenize("")), {}]]

    def draw(patched):
        return sample(patched, latent["samples"], steps=2, positive=words, negative=nothing)

    references = References(net, encoded)
    assert torch.equal(draw(apply_references(model, references, 0.0)), draw(model))
    assert not torch.equal(draw(apply_references(model, references, 1.0)), draw(model))
