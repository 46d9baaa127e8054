"""Saved references: bit for bit, and only for the network that made them."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from refusal import sentence

from retrieval_core.bank.bank_file import Maker, fingerprint, load_references, save_references
from retrieval_core.bank.thumbnails import sheet, thumbnail
from retrieval_core.errors import RetrievalError
from retrieval_core.files import read_metadata, read_safetensors, save_safetensors
from retrieval_core.network.controlnet import Card, RetrievalControlNet
from retrieval_core.network.unet import UNetConfig
from retrieval_core.sampling.applications import Retrieval

CONFIG = UNetConfig(32, (1, 2), (1, 1), (0, 1), 1, 16, num_head_channels=16)


def make(seed: int) -> RetrievalControlNet:
    torch.manual_seed(seed)
    network = RetrievalControlNet(CONFIG, Card("paperdoll"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return network.eval().requires_grad_(False)


@pytest.fixture
def network():
    return make(0)


@pytest.fixture
def references(network):
    torch.manual_seed(1)
    mask = torch.zeros(8, 8)
    mask[2:5] = 1
    return network.encode(
        torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16), masks=[None, mask],
        weights=[1.0, 0.4], concepts=["face", "clothes"],
    )  # fmt: skip


def test_saved_then_loaded_retrieves_bit_for_bit(network, references, tmp_path):
    save_references(tmp_path / "her.safetensors", references, network)
    loaded = load_references(tmp_path / "her.safetensors", network)
    assert [(r.weight, r.concept) for r in loaded] == [(1.0, "face"), (0.4, "clothes")]
    h = torch.randn(1, 32, 8, 8)
    results = [
        Retrieval(network.retrieval, network.bank(r)).apply("input_0", h, [0])
        for r in (references, loaded)
    ]
    assert torch.equal(*results)
    assert [p.name for p in tmp_path.iterdir()] == ["her.safetensors"]


def test_fingerprints_tell_networks_apart_but_not_types():
    one, same, other = make(0), make(0), make(1)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert fingerprint(one.half()) == fingerprint(make(0).half().float())
    with torch.no_grad():
        other = make(0)
        other.retrieval["middle"].to_v.weight[0, 0] += 0.1
    assert fingerprint(other) != fingerprint(same)


def test_references_of_another_network_are_refused(network, references, tmp_path):
    save_references(tmp_path / "r.safetensors", references, network)
    with pytest.raises(RetrievalError, match="another network"):
        load_references(tmp_path / "r.safetensors", make(1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "'other'"),
        ({"format_version": "3"}, "version 3"),
        ({"format_version": "1"}, "version 1, which kept keys and values"),
        ({"references": "["}, "cannot be read"),
        ({"references": '[{"weight": -1, "concept": "face"}]'}, "-1"),
        ({"references": '[{"weight": 1, "concept": "face"}]'}, "first wrong key: 1.features"),
        ({"references": "[]"}, "0 references"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(network, references, tmp_path, change, words):
    path = tmp_path / "r.safetensors"
    save_references(path, references, network)
    tensors, metadata = read_safetensors(path)
    save_safetensors(path, tensors, metadata | change)
    with pytest.raises(RetrievalError) as caught:
        load_references(path, network)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_thumbnails_are_kept_and_shown_on_the_cover(network, references, tmp_path):
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).expand(40, 30, 3)
    path = tmp_path / "r.safetensors"
    save_references(path, [references[0], replace(references[1], thumbnail=red)], network)
    first, second = load_references(path, network)
    assert first.thumbnail is None and torch.equal(second.thumbnail, red)
    (cover,) = json.loads(read_metadata(path)["ssmd_cover_images"])
    picture = Image.open(io.BytesIO(base64.b64decode(cover))).convert("RGB")
    assert picture.size == (30, 40) and picture.getpixel((15, 20))[0] > 240
    save_references(path, references, network)
    assert "ssmd_cover_images" not in read_metadata(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("0.thumbnail", torch.zeros(4, 4)),
        ("0.thumbnail", torch.zeros(4, 4, 1, dtype=torch.uint8)),
        ("9.thumbnail", torch.zeros(4, 4, 3, dtype=torch.uint8)),
        ("1.features.middle", torch.zeros(2, 65)),
        ("1.features.middle", torch.zeros(16, 64, dtype=torch.int32)),
        ("1.features.elsewhere", torch.zeros(16, 64)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(network, references, tmp_path, key, value):
    path = tmp_path / "r.safetensors"
    save_references(path, references, network)
    tensors, metadata = read_safetensors(path)
    save_safetensors(path, {k: v.clone() for k, v in tensors.items()} | {key: value}, metadata)
    assert key.split(".")[-1] in sentence(load_references, path, network)


def test_what_was_loaded_outlives_its_file(network, references, tmp_path):
    path = tmp_path / "r.safetensors"
    save_references(path, references, network)
    loaded = load_references(path, network)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(loaded[0].tokens["input_0"], references[0].tokens["input_0"])


def test_a_maker_stands_for_its_network(network, references, tmp_path):
    path = tmp_path / "r.safetensors"
    save_references(path, references, Maker.of(network))
    assert len(load_references(path, network)) == 2
    other = replace(Maker.of(network), fingerprint="0")
    assert "another network" in sentence(load_references, path, other)


@pytest.mark.parametrize(("height", "width", "size"), [(64, 64, (64, 64)), (300, 150, (128, 64))])
def test_thumbnails_are_small(height, width, size):
    made = thumbnail(torch.full((3, height, width), 0.5))
    assert made.shape == (*size, 3) and made.dtype == torch.uint8 and (made == 128).all()


def test_a_sheet_holds_each_thumbnail():
    pictures = [torch.full((10, 10, 3), 10 * i, dtype=torch.uint8) for i in range(5)]
    made = sheet(pictures)
    assert made.shape == (20, 30, 3)
    assert made[5, 5::10, 0].tolist() == [0, 10, 20]
    assert made[15, 5::10, 0].tolist() == [30, 40, 128]
    assert sheet([]) is None


def test_nothing_to_save_is_refused(network, tmp_path):
    with pytest.raises(RetrievalError, match="no references to save"):
        save_references(tmp_path / "r.safetensors", [], network)
    assert list(tmp_path.iterdir()) == []
