"""What the nodes refuse before a prompt is queued, and what they do not run."""

from __future__ import annotations

import json

import comfy.utils
import folder_paths
import pytest
from making import TINY_SD15, checkpoint, encoded, loaded, model_from
from retrieval_pack.nodes.host.folders import NETWORKS
from retrieval_pack.nodes.load_retrieval_controlnet import FILE, HUB, RetrievalControlNetLoader
from retrieval_pack.retrieval_core.errors import RetrievalError
from serving import with_inputs
from workflows import api_form, example, the_node

LOADER, ENCODE = "RetrievalControlNetLoader", "RetrievalEncodeReferences"
APPLY, CONTROLS = "RetrievalApplyReferences", "RetrievalControls"


@pytest.fixture(scope="module")
def prompt(node_info):
    """With one output: the host queues every output that does not depend on a bad value."""
    made = api_form(example("Demo - Two characters"), node_info)
    return {key: node for key, node in made.items() if node["class_type"] != "PreviewImage"}


HUB_FIELDS = {
    "network.repository": "owner/name",
    "network.repository_file": "",
    "network.revision": "",
}


@pytest.mark.parametrize(
    ("kind", "inputs", "words"),
    [
        (APPLY, {"start_percent": 0.9, "end_percent": 0.1}, ["0.9", "0.1"]),
        (CONTROLS, {"strength_curve": "numbers", "curve_numbers": "1, high"}, ["'high'", "0.5"]),
        (CONTROLS, {"strength_curve": "steep"}, ["'steep'", "'ease in'"]),
        (LOADER, {"network": HUB, **HUB_FIELDS}, ["'repository_file' is empty"]),
        (LOADER, {"network": FILE, "network.file": "gone.safetensors"}, ["'gone.safetensors'"]),
        # Of a workflow from before the choices: a file's name stood in their place.
        (LOADER, {"network": "mine.safetensors"}, ["choice of network", "'file'"]),
        (ENCODE, {"concept": "long red hair"}, ["The concept is none", "'tags'"]),
    ],
    ids=["schedule", "numbers", "curve", "hub", "file", "network", "concept"],
)
def test_a_bad_value_is_refused_before_queueing(server, prompt, kind, inputs, words):
    node = next(key for key, entry in prompt.items() if entry["class_type"] == kind)
    status, answer = server.post("/prompt", {"prompt": with_inputs(prompt, node, **inputs)})
    assert status == 400 and list(answer["node_errors"]) == [node], json.dumps(answer)
    errors = [error["details"] for error in answer["node_errors"][node]["errors"]]
    sentences = {details.partition(" - ")[2] for details in errors}
    (sentence,) = sentences
    assert all(word in sentence for word in words), sentence
    assert sentence.endswith(".") and "\n" not in sentence
    assert not server.json("/queue")["queue_pending"]


@pytest.fixture
def networks(monkeypatch, tmp_path):
    """The host's folder of networks, empty."""
    kind = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, NETWORKS, kind)
    folder_paths.filename_list_cache.pop(NETWORKS, None)
    yield tmp_path
    folder_paths.filename_list_cache.pop(NETWORKS, None)


@pytest.mark.parametrize("file", [None, "none"])
def test_an_empty_folder_of_networks_is_said_to_be_empty(networks, file):
    """Its list on the page is empty too, and the page queues null."""
    choice = {"network": FILE, "file": file}
    sentence = RetrievalControlNetLoader.validate_inputs(choice)
    assert f"in models/{NETWORKS}; the folder has none, so put one there and press R" in sentence
    assert sentence.endswith(".") and sentence.count(". ") == 0
    with pytest.raises(RetrievalError) as caught:
        RetrievalControlNetLoader.execute(model_from(checkpoint(TINY_SD15)), choice)
    assert str(caught.value) == sentence


def test_a_file_put_there_after_the_page_was_loaded_is_to_be_chosen(networks):
    (networks / "new.safetensors").touch()
    choice = {"network": FILE, "file": None}
    # Before queueing, a link looks the same.
    assert RetrievalControlNetLoader.validate_inputs(choice) is True
    assert RetrievalControlNetLoader.fingerprint_inputs(choice) == "missing"
    with pytest.raises(RetrievalError, match=f"No file is chosen in models/{NETWORKS}; choose"):
        RetrievalControlNetLoader.execute(model_from(checkpoint(TINY_SD15)), choice)


def test_references_are_not_encoded_at_strength_0(server, node_info):
    prompt = api_form(example("Demo - Same character"), node_info)
    sampler = the_node(prompt, "KSampler", model=[the_node(prompt, APPLY), 0])
    drawn = the_node(prompt, "RetrievalPaperdollReference")
    prompt = with_inputs(with_inputs(prompt, sampler, steps=1), drawn, character=4242)
    encode = the_node(prompt, ENCODE)
    for strength, expected in ((0.0, False), (1.0, True)):
        entry = server.run(with_inputs(prompt, the_node(prompt, APPLY), strength=strength))
        assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])
        assert (encode in entry["outputs"]) is expected


def test_each_reference_is_shown_while_it_is_encoded(tmp_path):
    model = model_from(checkpoint(TINY_SD15))
    net = loaded(tmp_path, model, TINY_SD15, "sd15")
    shown = []
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(
        lambda done, total, preview, **_: shown.append((done, total, preview))
    )
    try:
        references = encoded(net, 2)
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
    assert [(done, total) for done, total, _ in shown] == [(0, 2), (1, 2), (2, 2)]
    for (_, _, preview), reference in zip(shown, references.encoded):
        kind, picture, _ = preview
        assert kind == "JPEG" and list(picture.size) == [64, 64]
        assert picture.tobytes() == reference.thumbnail.numpy().tobytes()
    assert shown[-1][2] is None
