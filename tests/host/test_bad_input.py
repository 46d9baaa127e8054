"""One sentence for everything a user can get wrong, and the server goes on."""

from __future__ import annotations

import types

import pytest
import torch
from making import (
    TINY_SD15,
    TINY_SD21,
    FakeCLIP,
    FakeVAE,
    checkpoint,
    core_network,
    encoded,
    images,
    loaded,
    model_from,
)
from retrieval_pack.nodes.encode_references import (
    BACKGROUND,
    SUBJECT,
    RetrievalEncodeReferences,
)
from retrieval_pack.nodes.host.apply import apply_references
from retrieval_pack.nodes.host.base_model import detect_base
from retrieval_pack.nodes.host.trained_network import load_network
from retrieval_pack.nodes.load_retrieval_controlnet import (
    FILE,
    RetrievalControlNetLoader,
)
from retrieval_pack.retrieval_core.errors import RetrievalError
from retrieval_pack.retrieval_core.files import save_safetensors


@pytest.fixture(scope="module")
def model():
    return model_from(checkpoint(TINY_SD15))


@pytest.fixture(scope="module")
def net(model, tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("net"), model, TINY_SD15, "sd15")


def refused(call, *words) -> str:
    with pytest.raises(RetrievalError) as caught:
        call()
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert text.endswith(".") and "\n" not in text and text.count(". ") == 0, text
    return text


def encode(
    net, batch, mask=None, references=None, vae=None, clip=None, weight=1.0, size=64, marks=SUBJECT
):
    return RetrievalEncodeReferences.execute(
        net,
        batch,
        vae or FakeVAE(),
        clip or FakeCLIP(net.network.config.context_dim),
        {"concept": "figure"},
        weight,
        size,
        marks,
        mask,
        references,
    ).args[0]


def test_other_bases_are_named_and_refused():
    flux = types.SimpleNamespace(
        get_model_object=lambda name: torch.nn.Linear(1, 1), model=type("Flux", (), {})()
    )
    text = refused(lambda: detect_base(flux), "Flux", "SD 1.5", "SDXL")
    assert "paper-doll" in text


def test_bases_by_what_they_are(model):
    assert detect_base(model).name == "sd15"
    sd21 = model_from(checkpoint(TINY_SD21))
    assert detect_base(sd21).name == "sd21"


def test_a_network_of_another_base(model, tmp_path):
    path = tmp_path / "other.safetensors"
    core_network(TINY_SD21, "sd21").save(path)
    refused(lambda: load_network(path, model), "sd21", "sd15")


def test_a_network_of_another_variant(model, tmp_path):
    from making import SD15

    path = tmp_path / "wider.safetensors"
    core_network(SD15, "sd15").save(path)
    refused(lambda: load_network(path, model), "sites", "320/320/320")


def test_wrong_files(model, tmp_path):
    checkpoint_file = tmp_path / "model.safetensors"
    save_safetensors(checkpoint_file, {"a": torch.zeros(1)}, {})
    refused(lambda: load_network(checkpoint_file, model), "choose a retrieval network")
    broken = tmp_path / "broken.safetensors"
    core_network(TINY_SD15, "sd15").save(broken)
    broken.write_bytes(broken.read_bytes()[:1000])
    refused(lambda: load_network(broken, model), "broken.safetensors")
    refused(lambda: load_network(tmp_path / "gone.safetensors", model), "no file")
    gone = {"network": FILE, "file": "gone.safetensors"}
    refused(lambda: RetrievalControlNetLoader.execute(model, gone), "gone")


def test_references_of_another_network(model, net, tmp_path):
    other = loaded(tmp_path, model, TINY_SD15, "sd15", seed=9)
    refs = encoded(net)
    refused(lambda: encode(other, images(1), references=refs), "same network")
    same = load_network_again(tmp_path, model)
    assert len(encode(same[0], images(1), references=encoded(same[1])).encoded) == 2


def load_network_again(folder, model):
    """One file under two names: the weights count, not the name."""
    path = folder / "a.safetensors"
    core_network(TINY_SD15, "sd15").save(path)
    first = load_network(path, model)
    copy = folder / "b.safetensors"
    copy.write_bytes(path.read_bytes())
    second = load_network(copy, model)
    assert first is not second
    return first, second


def test_references_for_another_model(net):
    sd21 = model_from(checkpoint(TINY_SD21))
    refused(lambda: apply_references(sd21, encoded(net), 1.0), "sd15", "sd21")


def test_images_and_masks(net):
    refused(lambda: encode(net, torch.zeros(0, 8, 8, 3)), "empty")
    refused(lambda: encode(net, images(1), mask=torch.zeros(1, 64, 63)), "to background")
    white = torch.ones(1, 64, 64)
    refused(lambda: encode(net, images(1), mask=white, marks=BACKGROUND), "set it to subject")
    refused(lambda: encode(net, images(1), mask=torch.zeros(0, 64, 64)), "masks is empty")
    refused(lambda: encode(net, torch.full((1, 8, 8, 3), float("nan"))), "finite")
    refused(lambda: encode(net, images(1), weight=float("nan")), "weight")
    half = torch.zeros(1, 9, 5)  # of another size: resized, as the host does
    half[:, :4] = 1
    masked = encode(net, images(2), mask=half).encoded
    whole = encode(net, images(2)).encoded
    assert len(masked) == 2
    assert masked[1].tokens["input_0"].shape[1] < whole[1].tokens["input_0"].shape[1]
    assert len(encode(net, torch.rand(1, 30, 50, 4)).encoded) == 1  # RGBA, not square


def test_vae_and_clip_of_another_base(net):
    refused(lambda: encode(net, images(1), vae=FakeVAE(8)), "8 channels", "reads 4")
    refused(lambda: encode(net, images(1), clip=FakeCLIP(2048)), "2048", "768")


def test_missing_vae_and_clip(net):
    def without(vae, clip):
        RetrievalEncodeReferences.execute(net, images(1), vae, clip, {"concept": "figure"}, 1.0, 64)

    refused(lambda: without(None, FakeCLIP()), "VAE input is empty")
    refused(lambda: without(FakeVAE(), None), "CLIP input is empty")


def test_settings(model, net):
    refs = encoded(net)
    refused(lambda: apply_references(model, refs, 1.0, 0.8, 0.2), "0.8", "0.2")
    refused(lambda: apply_references(model, refs, float("nan")), "nan")
    refused(lambda: apply_references(model, refs, 1.0, region=torch.zeros(1, 8, 8)), "region")
    refused(lambda: apply_references(model, refs, 1.0, region=torch.ones(3, 8, 8)), "3 masks")
    silent = encoded(net, weight=0.0)
    refused(lambda: apply_references(model, silent, 1.0), "weight 0")
