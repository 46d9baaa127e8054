"""Saved references: bit for bit, and only for the network that made them."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from reference_maker import describe_maker
from refusal import sentence

from retrieval_core.bank.bank_file import (
    KEYS_AND_VALUES,
    Maker,
    load_references,
    save_references,
)
from retrieval_core.bank.encoding import encode_references
from retrieval_core.bank.site_bank import make_network_bank
from retrieval_core.bank.thumbnails import draw_thumbnails, make_thumbnail
from retrieval_core.bank.tokens import EncodedReference, join_references
from retrieval_core.files import read_metadata, read_safetensors, save_safetensors
from retrieval_core.network.controlnet import Card, RetrievalControlNet
from retrieval_core.network.fingerprint import fingerprint_weights
from retrieval_core.network.unet import UNetConfig
from retrieval_core.sampling.applications import Retrieval
from retrieval_core.sampling.frozen_site import freeze_sites

CONFIG = UNetConfig(32, (1, 2), (1, 1), (0, 1), 1, 16, num_head_channels=16)


def make(seed: int) -> RetrievalControlNet:
    torch.manual_seed(seed)
    network = RetrievalControlNet(CONFIG, Card("paperdoll"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network():
    return make(0)


@pytest.fixture(scope="module")
def maker(network):
    return describe_maker(network)


@pytest.fixture
def references(network):
    torch.manual_seed(1)
    mask = torch.zeros(8, 6)
    mask[2:5] = 1
    return encode_references(
        network, torch.randn(2, 4, 8, 6), torch.randn(2, 3, 16), masks=[None, mask],
        weights=[1.0, 0.4], concepts=["face", "clothes"],
    )  # fmt: skip


def test_saved_then_loaded_retrieves_bit_for_bit(network, maker, references, tmp_path):
    save_references(tmp_path / "her.safetensors", references, maker)
    loaded = load_references(tmp_path / "her.safetensors", maker)
    assert [(r.weight, r.concept) for r in loaded] == [(1.0, "face"), (0.4, "clothes")]
    assert [r.latent_size for r in loaded] == [(8, 6), (8, 6)]
    h = torch.randn(1, 32, 8, 8)
    results = [
        Retrieval(
            make_network_bank(network, join_references(r)), sites=freeze_sites(network)
        ).add_retrieved("input_0", h, [0], 1.0)
        for r in (references, loaded)
    ]
    assert torch.equal(*results) and not torch.equal(results[0], h)
    assert [p.name for p in tmp_path.iterdir()] == ["her.safetensors"]


def test_fingerprints_tell_networks_apart_but_not_types():
    def fingerprint(network):
        return fingerprint_weights(network.state_dict())

    assert fingerprint(make(0)) == fingerprint(make(0)) != fingerprint(make(1))
    assert fingerprint(make(0).half()) == fingerprint(make(0).half().float())
    changed = make(0)
    with torch.no_grad():
        changed.retrieval["middle"].to_v.weight[0, 0] += 0.1
    assert fingerprint(changed) != fingerprint(make(0))


def test_a_fingerprint_is_of_the_types_that_weights_are_used_in():
    wide = {"a": torch.randn(9, generator=torch.Generator().manual_seed(0)), "b": torch.ones(2)}
    rounded = {**wide, "a": wide["a"].bfloat16()}
    assert fingerprint_weights(wide) != fingerprint_weights(rounded)
    assert fingerprint_weights(wide, {"a": torch.bfloat16}) == fingerprint_weights(rounded)


def test_references_of_another_network_are_refused(maker, references, tmp_path):
    save_references(tmp_path / "r.safetensors", references, maker)
    other = describe_maker(make(1))
    message = sentence(load_references, tmp_path / "r.safetensors", other)
    assert "another network" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "'other'"),
        ({"format_version": "3"}, "version 3"),
        ({"format_version": "1"}, "version 1, which kept keys and values"),
        ({"references": "["}, "cannot be read"),
        ({"references": '[{"weight": -1, "concept": "face"}]'}, "-1"),
        ({"references": '[{"weight": 1, "concept": "face"}]'}, "first wrong key: 1.features"),
        (
            {"references": '[{"weight": 1, "concept": "face", "latent_size": [8]}]'},
            "cannot be read",
        ),
        ({"references": "[]"}, "0 references"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(maker, references, tmp_path, change, words):
    path = tmp_path / "r.safetensors"
    save_references(path, references, maker)
    tensors, metadata = read_safetensors(path)
    save_safetensors(path, tensors, metadata | change)
    assert words in sentence(load_references, path, maker)


def test_thumbnails_are_kept_and_shown_on_the_cover(maker, references, tmp_path):
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).expand(40, 30, 3)
    path = tmp_path / "r.safetensors"
    save_references(path, [references[0], replace(references[1], thumbnail=red)], maker)
    first, second = load_references(path, maker)
    assert first.thumbnail is None and torch.equal(second.thumbnail, red)
    (cover,) = json.loads(read_metadata(path)["ssmd_cover_images"])
    picture = Image.open(io.BytesIO(base64.b64decode(cover))).convert("RGB")
    assert picture.size == (30, 40) and picture.getpixel((15, 20))[0] > 240
    save_references(path, references, maker)
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
def test_tensors_that_do_not_fit_are_refused(maker, references, tmp_path, key, value):
    path = tmp_path / "r.safetensors"
    save_references(path, references, maker)
    tensors, metadata = read_safetensors(path)
    save_safetensors(path, {k: v.clone() for k, v in tensors.items()} | {key: value}, metadata)
    assert key.split(".")[-1] in sentence(load_references, path, maker)


def test_what_was_loaded_outlives_its_file(maker, references, tmp_path):
    path = tmp_path / "r.safetensors"
    save_references(path, references, maker)
    loaded = load_references(path, maker)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(loaded[0].tokens["input_0"], references[0].tokens["input_0"])


def test_files_that_say_nothing_of_latent_sizes_are_read(maker, references, tmp_path):
    path = tmp_path / "r.safetensors"
    save_references(path, references, maker)
    tensors, metadata = read_safetensors(path)
    about = [{"weight": 1, "concept": "face"}] * 2
    save_safetensors(path, tensors, metadata | {"references": json.dumps(about)})
    assert [r.latent_size for r in load_references(path, maker)] == [(0, 0), (0, 0)]


@pytest.mark.parametrize("version", ["1", "2"])
def test_keys_and_values_of_both_versions_are_read(tmp_path, version):
    path, maker = tmp_path / "r.safetensors", Maker("sd15", "f", {"a": 6, "b": 4}, KEYS_AND_VALUES)
    tokens = {"a": torch.randn(2, 5, 6), "b": torch.randn(2, 3, 4)}
    save_references(path, [EncodedReference(tokens)], maker)
    tensors, metadata = read_safetensors(path)
    assert torch.equal(tensors["0.values.b"], tokens["b"][1])
    save_safetensors(path, tensors, metadata | {"format_version": version})
    (loaded,) = load_references(path, maker)
    assert all(torch.equal(loaded.tokens[site], t) for site, t in tokens.items())


@pytest.mark.parametrize(("height", "width", "size"), [(64, 64, (64, 64)), (300, 150, (128, 64))])
def test_thumbnails_are_small(height, width, size):
    made = make_thumbnail(torch.full((3, height, width), 0.5))
    assert made.shape == (*size, 3) and made.dtype == torch.uint8 and (made == 128).all()


def test_a_sheet_holds_each_thumbnail():
    pictures = [torch.full((10, 10, 3), 10 * i, dtype=torch.uint8) for i in range(5)]
    made = draw_thumbnails(pictures)
    assert made.shape == (20, 30, 3)
    assert made[5, 5::10, 0].tolist() == [0, 10, 20]
    assert made[15, 5::10, 0].tolist() == [30, 40, 128]
    assert draw_thumbnails([]) is None


def test_nothing_to_save_is_refused(maker, tmp_path):
    message = sentence(save_references, tmp_path / "r.safetensors", [], maker)
    assert "no references to save" in message
    assert list(tmp_path.iterdir()) == []
