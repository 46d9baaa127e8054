"""The pack as the host finds it: node ids, inputs, folder, and the nodes run one after another."""

from __future__ import annotations

import asyncio
import sys
import time
import types
from collections import Counter
from dataclasses import fields
from pathlib import Path

import folder_paths
import pytest
import torch
from comfy_api.latest import io
from making import (
    TINY_SD15,
    FakeCLIP,
    FakeVAE,
    checkpoint,
    core_network,
    images,
    model_from,
    sample,
)
from released import stand_in_for_server
from retrieval_pack.nodes import RetrievalExtension
from retrieval_pack.nodes.apply_reference_retrieval import RetrievalApplyReferences
from retrieval_pack.nodes.encode_references import SUBJECT, RetrievalEncodeReferences
from retrieval_pack.nodes.host import folders
from retrieval_pack.nodes.host.folders import NETWORKS
from retrieval_pack.nodes.load_retrieval_controlnet import FILE, HUB, RetrievalControlNetLoader
from retrieval_pack.nodes.retrieval_controls import RetrievalControls

PACK = Path(__file__).resolve().parents[2]


def test_the_host_loads_the_pack_and_its_nodes(tmp_path, monkeypatch):
    import nodes

    stand_in_for_server(monkeypatch, types.SimpleNamespace(register=lambda replacement: None))
    place = tmp_path / "any folder.name"
    place.symlink_to(PACK, target_is_directory=True)
    started = time.process_time()  # not of the clock, which others' work on the machine moves
    heavy = {"transformers", "accelerate", "huggingface_hub", "matplotlib"} - set(sys.modules)
    assert asyncio.run(nodes.load_custom_node(str(place)))
    elapsed = time.process_time() - started
    print(f"\nimport of the pack: {elapsed:.3f} s")
    assert elapsed < 0.5
    assert not heavy & set(sys.modules)
    for name in ("ControlNetLoader", "EncodeReferences", "ApplyReferences"):
        assert f"Retrieval{name}" in nodes.NODE_CLASS_MAPPINGS
    assert (
        nodes.NODE_DISPLAY_NAME_MAPPINGS["RetrievalApplyReferences"] == "Apply Reference Retrieval"
    )


def test_every_node_has_its_words():
    for node in asyncio.run(RetrievalExtension().get_node_list()):
        schema = node.GET_SCHEMA()
        assert schema.node_id.startswith("Retrieval") and schema.description and schema.display_name
        assert schema.category.split("/")[0] == "retrieval"
        for given in schema.inputs:
            assert given.tooltip and given.tooltip.endswith("."), (schema.node_id, given.id)


def test_nodes_are_found_by_other_words_where_the_host_searches_them():
    knows = "search_aliases" in {field.name for field in fields(io.Schema)}  # not in 0.8.0
    found = Counter()
    for node in asyncio.run(RetrievalExtension().get_node_list()):
        words = getattr(node.GET_SCHEMA(), "search_aliases", [])
        assert bool(words) is knows, node.GET_SCHEMA().node_id
        found.update(words)
    for word in ("ipadapter", "reference only", "consistent character", "faceid"):
        assert (found[word] > 0) is knows


def test_inputs_that_few_need_are_folded_in_every_host():
    for node, name in (
        (RetrievalControls, "token_budget"),
        (RetrievalApplyReferences, "guidance"),
        (RetrievalEncodeReferences, "size"),
    ):
        given = node.INPUT_TYPES()
        _, options = {**given["required"], **given.get("optional", {})}[name]
        assert options["advanced"] is True


def test_the_folder_keeps_extra_paths(monkeypatch, tmp_path):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, NETWORKS, ([str(tmp_path)], set()))
    folders.register_folder(NETWORKS)
    paths, extensions = folder_paths.folder_names_and_paths[NETWORKS]
    assert paths == [str(tmp_path), str(Path(folder_paths.models_dir) / NETWORKS)]
    folders.register_folder(NETWORKS)
    assert folder_paths.folder_names_and_paths[NETWORKS] == (paths, extensions)
    for name in ("a.safetensors", "b.pt", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    folder_paths.filename_list_cache.pop(NETWORKS, None)
    assert folders.list_files(NETWORKS) == ["a.safetensors"]
    options = {
        option.key: option for option in RetrievalControlNetLoader.GET_SCHEMA().inputs[1].options
    }
    assert options[FILE].inputs[0].options == ["a.safetensors"]


@pytest.fixture
def in_folder(monkeypatch, tmp_path):
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, NETWORKS, ([str(tmp_path)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop(NETWORKS, None)
    yield tmp_path
    folder_paths.filename_list_cache.pop(NETWORKS, None)


def test_load_encode_apply(in_folder):
    path = in_folder / "mine.safetensors"
    core_network(TINY_SD15, "sd15").save(path)
    model = model_from(checkpoint(TINY_SD15))
    mine = {"network": FILE, "file": "mine.safetensors"}
    before = RetrievalControlNetLoader.fingerprint_inputs(network=mine)
    (net,) = RetrievalControlNetLoader.execute(model, mine).args
    (again,) = RetrievalControlNetLoader.execute(model.clone(), mine).args
    assert again is net  # a LoRA before the loader changes the model, not the network
    vae, clip = FakeVAE(), FakeCLIP()
    face, _ = RetrievalEncodeReferences.execute(
        net, images(1), vae, clip, {"concept": "face"}, 1.2, 64
    ).args
    both, _ = RetrievalEncodeReferences.execute(
        net, images(2, seed=8), vae, clip, {"concept": "tags", "tags": "red coat"}, 1.0, 64,
        SUBJECT, torch.ones(1, 20, 20), face,
    ).args  # fmt: skip
    assert [(r.concept, r.weight) for r in both.encoded] == [
        ("face", 1.2),
        ("red coat", 1.0),
        ("red coat", 1.0),
    ]
    assert len(face.encoded) == 1
    (patched,) = RetrievalApplyReferences.execute(model, both, 1.5, 0.0, 1.0, "recommended").args
    assert not torch.equal(sample(patched), sample(model))
    (off,) = RetrievalApplyReferences.execute(model, both, 0.0, 0.0, 1.0, "both").args
    assert torch.equal(sample(off), sample(model))
    core_network(TINY_SD15, "sd15", seed=4).save(path)
    assert RetrievalControlNetLoader.fingerprint_inputs(network=mine) != before
    (replaced,) = RetrievalControlNetLoader.execute(model, mine).args
    assert replaced.maker.fingerprint != net.maker.fingerprint


def test_a_file_from_the_hub_goes_through_the_folder(in_folder, monkeypatch):
    from retrieval_pack.retrieval_core import hub

    asked = []

    def download(repo_id, filename, revision, folder, progress=None):
        asked.append((repo_id, filename, revision, Path(folder)))
        progress(1, 2)
        path = Path(folder) / "fetched.safetensors"
        core_network(TINY_SD15, "sd15").save(path)
        return path

    monkeypatch.setattr(hub, "download", download)
    model = model_from(checkpoint(TINY_SD15))
    repository = {"repository": " owner/name ", "repository_file": "net.safetensors"}
    out = RetrievalControlNetLoader.execute(model, {"network": HUB, **repository, "revision": ""})
    assert out.args[0].name == "fetched.safetensors"
    assert asked == [("owner/name", "net.safetensors", None, in_folder)]
