"""Save References and Load References in the host."""

from __future__ import annotations

import base64
import io as bytes_io
import json
import os
from pathlib import Path

import folder_paths
import pytest
import torch
from dolls import Dolls
from making import core_network
from PIL import Image
from reference_maker import describe_maker
from retrieval_pack.nodes.encode_references import RetrievalEncodeReferences
from retrieval_pack.nodes.host import loading
from retrieval_pack.nodes.host.apply import apply_references
from retrieval_pack.nodes.host.folders import REFERENCES
from retrieval_pack.nodes.host.trained_network import load_network
from retrieval_pack.nodes.load_references import RetrievalLoadReferences
from retrieval_pack.nodes.save_references import RetrievalSaveReferences
from retrieval_pack.retrieval_core.files import read_metadata
from retrieval_pack.retrieval_core.network.controlnet import load
from retrieval_pack.retrieval_core.sampling.controls import Controls


@pytest.fixture(scope="module")
def dolls(tmp_path_factory):
    with torch.inference_mode():
        return Dolls(tmp_path_factory.mktemp("dolls"))


@pytest.fixture
def folder(monkeypatch, tmp_path):
    home = tmp_path / "retrieval_references"
    kept = ([str(home)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, REFERENCES, kept)
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    folder_paths.filename_list_cache.pop(REFERENCES, None)
    yield home
    folder_paths.filename_list_cache.pop(REFERENCES, None)


def refused(call, *arguments) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and ". " not in message, message
    return message


def saved(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_the_folder_is_registered():
    paths, extensions = folder_paths.folder_names_and_paths["retrieval_references"]
    assert str(Path(folder_paths.models_dir) / "retrieval_references") in paths
    assert extensions == {".safetensors", ".sft"}


def test_saved_then_loaded_samples_bit_for_bit(dolls, folder):
    mask = torch.zeros(1, 64, 64)
    mask[:, 10:50, 20:40] = 1
    face = dolls.references(1, seed=1, weight=0.7, masks=mask)
    more = dolls.references(2, seed=2, concept="clothes")
    refs = type(face)(dolls.network, (*face.encoded, *more.encoded))
    shown = RetrievalSaveReferences.execute(refs, "anna").ui.as_dict()
    assert len(shown["images"]) == 1  # the thumbnails, as a preview in the node
    assert saved(folder) == ["anna_00001_.safetensors"]
    out = RetrievalLoadReferences.execute(dolls.network, "anna_00001_.safetensors", 1.0)
    (loaded,) = out.args
    told = out.ui["retrieval_references"]
    assert [(one["weight"], one["concept"]) for one in told] == [
        (0.7, "face"), (1.0, "clothes"), (1.0, "clothes")
    ]  # fmt: skip
    # The mask touches 11 x 5 of 16 x 16 positions of the latent.
    assert [one["kept"] for one in told] == [55 / 256, 1, 1]
    for one in told:
        assert (Path(folder_paths.get_temp_directory()) / one["image"]["filename"]).is_file()
    assert [(r.weight, r.concept) for r in loaded.encoded] == [
        (0.7, "face"), (1.0, "clothes"), (1.0, "clothes")
    ]  # fmt: skip
    for controls in (None, Controls(token_budget=50)):
        samples = [
            dolls.sample(apply_references(dolls.model, r, 1.2, controls=controls))
            for r in (refs, loaded)
        ]
        assert torch.equal(*samples)
    assert not torch.equal(samples[0], dolls.sample(dolls.model))


def test_another_copy_of_the_network_and_the_core_read_the_same_file(dolls, folder):
    from retrieval_pack.retrieval_core.bank.bank_file import load_references

    refs = dolls.references(1)
    RetrievalSaveReferences.execute(refs, "x")
    copy = folder.parent / "copy.safetensors"
    copy.write_bytes(dolls.path.read_bytes())
    again = load_network(copy, dolls.model)
    assert again is not dolls.network
    (loaded,) = RetrievalLoadReferences.execute(again, "x_00001_.safetensors", 1.0).args
    assert torch.equal(loaded.encoded[0].tokens["middle"], refs.encoded[0].tokens["middle"])
    in_core = load_references(folder / "x_00001_.safetensors", describe_maker(load(copy)))
    assert torch.equal(in_core[0].tokens["middle"], refs.encoded[0].tokens["middle"])


def test_the_fingerprint_does_not_depend_on_the_type_this_machine_computes_in(
    dolls, folder, monkeypatch
):
    path = folder.parent / "half.safetensors"
    core_network(dolls.base.unet.config, "paperdoll").save(path, torch.float16)
    prints = set()
    for kind in (torch.float16, torch.bfloat16, torch.float32):
        monkeypatch.setattr(loading.management, "unet_dtype", lambda *_, kind=kind, **__: kind)
        os.utime(path, ns=(len(prints) + 1, 10**18 + 10**9 * kind.itemsize + len(str(kind))))
        net = load_network(path, dolls.model)
        assert net.compute_dtype == torch.float32  # on a CPU, whatever the weights' type
        prints.add(net.maker.fingerprint)
    assert len(prints) == 1


def test_nothing_is_overwritten(dolls, folder):
    refs = dolls.references(1)
    for _ in range(2):
        RetrievalSaveReferences.execute(refs, "anna")
    first = (folder / "anna_00001_.safetensors").read_bytes()
    (folder / "anna_00002_.safetensors").rename(folder / "anna_00007_.safetensors")
    RetrievalSaveReferences.execute(refs, "anna")
    RetrievalSaveReferences.execute(refs, "people/anna")
    assert saved(folder) == [
        "anna_00001_.safetensors", "anna_00007_.safetensors", "anna_00008_.safetensors",
        "people/anna_00001_.safetensors",
    ]  # fmt: skip
    assert (folder / "anna_00001_.safetensors").read_bytes() == first
    assert (
        "people/anna_00001_.safetensors" in RetrievalLoadReferences.GET_SCHEMA().inputs[1].options
    )


@pytest.mark.parametrize(
    "name",
    ["", " ", "../x", "a/../../x", "/etc/x", ".hidden", "a\\..\\..\\x", "C:\\x", "a\nb", "a?"],
)
def test_names_that_leave_the_folder_are_refused_in_one_sentence(dolls, folder, name):
    assert repr(name) in refused(RetrievalSaveReferences.execute, dolls.references(1), name)
    assert not folder.exists() or not saved(folder)
    assert saved(folder.parent) == []


def test_a_link_out_of_the_folder_is_not_followed(dolls, folder, tmp_path):
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    folder.mkdir()
    (folder / "link").symlink_to(outside, target_is_directory=True)
    assert "link/x" in refused(RetrievalSaveReferences.execute, dolls.references(1), "link/x")
    assert list(outside.iterdir()) == []


def test_files_of_another_network_base_or_format_and_missing_ones(dolls, folder):
    RetrievalSaveReferences.execute(dolls.references(1), "x")
    other = folder.parent / "other.safetensors"
    core_network(dolls.base.unet.config, "paperdoll", seed=9).save(other)
    net = load_network(other, dolls.model)
    name = "x_00001_.safetensors"
    assert "another network" in refused(RetrievalLoadReferences.execute, net, name, 1.0)
    (folder / "net.safetensors").write_bytes(dolls.path.read_bytes())
    load_one = RetrievalLoadReferences.execute
    assert "retrieval_references" in refused(load_one, dolls.network, "net.safetensors", 1.0)
    for absent in ("gone.safetensors", "../network.safetensors", str(dolls.path)):
        assert "There is no file" in refused(load_one, dolls.network, absent, 1.0)
    (folder / name).write_bytes((folder / name).read_bytes()[:-50])
    assert "whole safetensors file" in refused(load_one, dolls.network, name, 1.0)
    assert "no references" in refused(
        RetrievalSaveReferences.execute, type(dolls.references(1))(dolls.network), "y"
    )


def test_weights_multiply_and_references_chain(dolls, folder):
    RetrievalSaveReferences.execute(dolls.references(2, weight=0.5), "x")
    before = dolls.references(1, seed=8)
    (both,) = RetrievalLoadReferences.execute(
        dolls.network, "x_00001_.safetensors", 3.0, before
    ).args
    assert [r.weight for r in both.encoded] == [1.0, 1.5, 1.5]
    RetrievalSaveReferences.execute(both, "all")  # loaded references keep their pictures
    kept = read_metadata(folder / "all_00001_.safetensors")
    second = json.loads(kept["references"])[1]
    assert second == {"weight": 1.5, "concept": "face", "latent_size": [16, 16]}


def test_the_cover_is_an_image_that_comfyui_shows(dolls, folder):
    from app.model_manager import ModelFileManager

    refs, _ = RetrievalEncodeReferences.execute(
        dolls.network, torch.ones(1, 40, 64, 3) * torch.tensor([1.0, 0.0, 0.0]), dolls.vae,
        dolls.clip, {"concept": "face"}, 1.0,
    ).args  # fmt: skip
    RetrievalSaveReferences.execute(refs, "red")
    path = folder / "red_00001_.safetensors"
    cover = base64.b64decode(json.loads(read_metadata(path)["ssmd_cover_images"])[0])
    picture = Image.open(bytes_io.BytesIO(cover)).convert("RGB")
    assert picture.size == (64, 64)
    red, green, blue = picture.getpixel((32, 32))
    assert red > 230 and green < 30 and blue < 30
    (shown,) = ModelFileManager().get_model_previews(str(path))
    assert shown.getvalue() == cover


def test_a_replaced_file_is_read_again(dolls, folder):
    name = "x_00001_.safetensors"
    assert RetrievalLoadReferences.fingerprint_inputs(file=name) == "missing"
    RetrievalSaveReferences.execute(dolls.references(1), "x")
    first = RetrievalLoadReferences.fingerprint_inputs(file=name)
    os.utime(folder / name, ns=(1, 1))
    assert RetrievalLoadReferences.fingerprint_inputs(file=name) not in ("missing", first)
