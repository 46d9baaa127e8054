"""Where a model is found: a folder, the cache, the hub; and what is said where it is not."""

from __future__ import annotations

import json
import os

import pytest
from fake_hub import FakeHub, use_endpoint
from huggingface_hub import constants
from refusal import sentence

from retrieval_core.metrics import model_folder
from retrieval_core.metrics.model_folder import check, fetch_model, find_model

NAME = "someone/tiny-clip"
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors",
                        "b": "model-00002-of-00002.safetensors"}}  # fmt: skip
FILES = {
    "config.json": b'{"model_type": "clip"}',
    # All different: the cache keeps equal contents once.
    "preprocessor_config.json": b"{}",
    "tokenizer.json": b'{"t": 1}',
    "merges.txt": b"a b",
    "spiece.model": b"spiece",
    "chat_template.jinja": b"{{ x }}",
    "qformer_tokenizer/tokenizer.json": b'{"q": 1}',
    "model.safetensors": b"w" * 3_000_000,
}
UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "modeling_evil.py": b"import os",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "consolidated.safetensors": b"twice",
    "model.fp16.safetensors": b"twice",
    "README.md": b"#",
    "../outside.json": b"{}",
    ".hidden.json": b"{}",
}


@pytest.fixture
def hub():
    running = FakeHub(NAME, {**FILES, **UNWANTED})
    yield running
    running.close()


@pytest.fixture
def find(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def call(name=NAME, progress=None, endpoint=hub.url):
        use_endpoint(monkeypatch, endpoint)
        return fetch_model(name, progress) if progress else find_model(str(name))

    return call


def written(folder, names=("config.json", "preprocessor_config.json", "model.safetensors")):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(FILES.get(name, b"{}"))
    return folder


def test_a_folder_is_taken_as_it_is(tmp_path, find, hub):
    folder = written(tmp_path / "model")
    assert find(folder) == folder
    assert hub.requests == 0


def test_a_folder_named_like_a_repository_comes_first(tmp_path, find, hub, monkeypatch):
    (tmp_path / "someone").mkdir()
    written(tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    assert find().resolve() == tmp_path / NAME and hub.requests == 0


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "has no config.json"),
        (("config.json",), "has no model.safetensors; only safetensors weights are read"),
        (("config.json", "model.safetensors"), "has no processor (preprocessor_config.json or"),
    ],
)
def test_folders_that_lack_a_part(tmp_path, names, words):
    folder = written(tmp_path / "model", names)
    assert words in sentence(find_model, folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert words in sentence(check, folder)


def test_weights_in_several_files_are_all_needed(tmp_path):
    folder = written(tmp_path, ("config.json", "processor_config.json"))
    (folder / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"w")
    message = sentence(check, folder)
    assert "lacks 1 of its weight files, such as model-00002-of-00002.safetensors" in message
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"w")
    check(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "not an index of weight files" in sentence(check, folder)


@pytest.mark.parametrize(
    "name", ["  ", "clip", "/nowhere/clip", "../clip", "a/b/c", "a b/c", "C:\\models\\clip",
             "https://huggingface.co/a/b", "a/b--c..d", "someone/x.git"],
)  # fmt: skip
def test_names_are_checked_before_any_request(find, hub, name):
    message = sentence(find, name)
    assert "neither a folder here nor the name of a hub repository" in message
    assert hub.requests == 0


def test_a_model_is_fetched_with_progress_and_nothing_else_is(find, hub, tmp_path):
    seen = []
    folder = find(progress=lambda *numbers: seen.append(numbers))
    found = {p.relative_to(folder).as_posix(): p.read_bytes()
             for p in folder.rglob("*") if p.is_file()}  # fmt: skip
    assert found == FILES
    assert sorted(hub.gets) == sorted(FILES) and hub.gets[-1] == "model.safetensors"
    total = sum(len(body) for body in FILES.values())
    assert seen[0] == (0, total) and seen[-1] == (total, total) and seen == sorted(seen)
    assert len(seen) > len(FILES)
    # It is in the cache now: no request, and no network is needed.
    asked = hub.requests
    assert find() == find(endpoint=NOBODY) == folder and hub.requests == asked


def test_weights_in_several_files_are_fetched(find, hub):
    del hub.files["model.safetensors"]
    hub.files["model.safetensors.index.json"] = json.dumps(INDEX).encode()
    for shard in INDEX["weight_map"].values():
        hub.files[shard] = shard.encode()
    folder = find()
    for shard in INDEX["weight_map"].values():
        assert (folder / shard).read_bytes() == shard.encode()


def test_an_interruption_passes_through_and_a_later_call_goes_on(find, hub):
    class StopError(Exception):
        pass

    def stop(done, total):
        if done:
            raise StopError

    with pytest.raises(StopError):
        find(progress=stop)
    before = list(hub.gets)
    assert "model.safetensors" not in before
    find()
    # Nothing twice, but for the file in which it stopped.
    assert set(hub.gets) == set(FILES) and len(hub.gets) <= len(FILES) + 1


def test_a_broken_cache_is_completed(find, hub):
    folder = find()
    os.unlink(folder / "model.safetensors")
    assert find() == folder and (folder / "model.safetensors").is_file()
    os.unlink(folder / "model.safetensors")
    assert "could not be reached" in sentence(find, endpoint=NOBODY)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("config.json", f"repository '{NAME}' has no config.json"),
        ("model.safetensors", "only safetensors weights are read"),
        ("preprocessor_config.json", "has no processor"),
    ],
)
def test_a_repository_that_lacks_a_part_is_refused_before_the_download(find, hub, gone, words):
    del hub.files[gone]
    assert words in sentence(find)
    assert hub.gets == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((403, "GatedRepo"), "is gated: accept its terms"),
        ((401, "RepoNotFound"), f"no repository '{NAME}' on the hub"),
        ((404, "RepoNotFound"), f"no repository '{NAME}' on the hub"),
        ((418, ""), "could not be reached"),
    ],
)
def test_refusals_of_the_hub(find, hub, answer, words):
    hub.answer = answer
    assert words in sentence(find)


def test_no_network(find):
    message = sentence(find, endpoint=NOBODY)
    assert f"could not be reached for '{NAME}'" in message and "path of a folder" in message


def test_no_network_in_the_middle(find, hub):
    hub.missing.add("tokenizer.json")
    assert "could not be reached" in sentence(find)


def test_a_full_disk(find, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder, "hf_hub_download", full)
    assert "no room left" in sentence(find)
