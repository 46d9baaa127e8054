"""The trained decoder on the user's own checkpoint: a difference that is added and taken away."""

from __future__ import annotations

import logging

import pytest
import torch
from making import (
    SD15,
    checkpoint,
    core_network,
    encoded,
    loaded,
    model_from,
    noise,
    same_weights,
    sample,
    weights_of,
)
from retrieval_pack.nodes.host.apply import apply_references
from retrieval_pack.nodes.host.trained_network import load_network
from retrieval_pack.retrieval_core.network.controlnet import (
    DECODER_PARTS,
    select_decoder,
    subtract_decoder,
)
from retrieval_pack.retrieval_core.network.unet import UNet

PREFIX = "diffusion_model."
KEY = f"{PREFIX}output_blocks.0.0.in_layers.2.weight"


def fine_tuned(share: float = 0.05):
    """The test base, its decoder changed at random by 5 percent."""
    weights = checkpoint(SD15)
    for i, key in enumerate(sorted(weights)):
        if key.removeprefix("model.diffusion_model.").startswith(DECODER_PARTS):
            change = noise(*weights[key].shape, seed=100 + i)
            weights[key] = weights[key] + share * weights[key].std() * change
    return model_from(weights)


@pytest.fixture(scope="module")
def model():
    return fine_tuned()


@pytest.fixture(scope="module")
def net(model, tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("net"), model, SD15, "sd15", decoder=True)


def loaded_weights(patched) -> dict[str, torch.Tensor]:
    """The weights that a MODEL samples with."""
    sample(patched, steps=1)
    return weights_of(patched)


@pytest.mark.parametrize(("strength", "share"), [(0.05, 0.05), (0.5, 0.5), (1.0, 1.0), (2.0, 1.0)])
def test_the_users_weights_plus_strength_times_the_difference(model, net, strength, share):
    before, plain = loaded_weights(model), sample(model)
    found = loaded_weights(apply_references(model, encoded(net), strength))
    for name, own in before.items():
        key = name.removeprefix(PREFIX)
        if key in net.network.decoder:
            torch.testing.assert_close(found[name], own + share * net.network.decoder[key])
        else:
            assert torch.equal(found[name], own)
    assert torch.equal(sample(model), plain)
    assert same_weights(model, before)


def test_a_lora_adds_to_it_before_or_after(model, net):
    refs, change = encoded(net), 0.05 * noise(*model.model.state_dict()[KEY].shape, seed=9)
    own, difference = loaded_weights(model)[KEY], net.network.decoder[KEY.removeprefix(PREFIX)]
    with_lora = model.clone()
    with_lora.add_patches({KEY: ("diff", (change,))}, 0.7)
    before = apply_references(with_lora, refs, 1.0)
    after = apply_references(model, refs, 1.0)
    after.add_patches({KEY: ("diff", (change,))}, 0.7)
    for patched in (before, after):
        expected = own + difference + 0.7 * change
        torch.testing.assert_close(loaded_weights(patched)[KEY], expected)


def test_on_the_training_base_it_is_the_trained_decoder(tmp_path):
    weights = checkpoint(SD15)
    own = {k.removeprefix("model.diffusion_model."): v for k, v in weights.items()}
    trained = {k: v + 0.1 * noise(*v.shape, seed=i) for i, (k, v) in enumerate(own.items())}
    network = core_network(SD15, "sd15")
    decoder = {k: v for k, v in trained.items() if k.startswith(DECODER_PARTS)}
    network.decoder = subtract_decoder(decoder, own)
    network.save(tmp_path / "net.safetensors")
    model = model_from(weights)
    net = load_network(tmp_path / "net.safetensors", model)
    found = loaded_weights(apply_references(model, encoded(net), 1.0))
    for key, value in decoder.items():
        torch.testing.assert_close(found[PREFIX + key], value)


def test_of_several_applications_the_strongest_counts(model, net):
    refs = encoded(net)
    own, difference = loaded_weights(model)[KEY], net.network.decoder[KEY.removeprefix(PREFIX)]
    for strengths in ((0.25, 0.75), (0.75, 0.25)):
        patched = model
        for strength in strengths:
            patched = apply_references(patched, refs, strength)
        torch.testing.assert_close(loaded_weights(patched)[KEY], own + 0.75 * difference)
    weaker = apply_references(model, refs, 0.25)
    apply_references(weaker, refs, 0.75)  # leaves the model it was given as it is
    torch.testing.assert_close(loaded_weights(weaker)[KEY], own + 0.25 * difference)


def test_two_trained_decoders_are_refused(model, net, tmp_path):
    other = loaded(tmp_path, model, SD15, "sd15", decoder=True, seed=8)
    patched = apply_references(model, encoded(net), 1.0)
    with pytest.raises(ValueError, match="already has the trained decoder"):
        apply_references(patched, encoded(other), 1.0)


def test_a_file_of_version_1_replaces_the_decoder_and_says_so(model, tmp_path, caplog):
    network = core_network(SD15, "sd15")
    network.decoder = {k: v.clone() for k, v in select_decoder(UNet(SD15)).items()}
    network.decoder_is_difference = False
    network.save(tmp_path / "old.safetensors")
    net = load_network(tmp_path / "old.safetensors", model)
    assert not net.network.decoder_is_difference
    before = loaded_weights(model)
    with caplog.at_level(logging.WARNING):
        patched = apply_references(model, encoded(net), 0.05)
    (said,) = (r.getMessage() for r in caplog.records if "format version 1" in r.getMessage())
    assert "old.safetensors" in said and "\n" not in said and said.endswith(".")
    found = loaded_weights(patched)
    for key, value in net.network.decoder.items():
        assert torch.equal(found[PREFIX + key], value)
    sample(model, steps=1)
    assert same_weights(model, before)
