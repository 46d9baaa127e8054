"""Any workflow as a method: its slots, and the HTTP API against a stand-in for the server."""

from __future__ import annotations

import json

import pytest
import torch
from fake_comfyui import FakeComfyUI
from refusal import sentence

from retrieval_core.evaluate.comfy import Client, ComfyMethod, decode, encode
from retrieval_core.evaluate.protocol import Protocol
from retrieval_core.evaluate.workflow import Workflow, load_workflow, parse_bindings
from retrieval_core.paperdoll import bundle as bundles
from retrieval_core.paperdoll import evaluate_dolls
from retrieval_core.paperdoll.doll_characters import PROMPTS, draw_characters
from retrieval_core.paperdoll.judge import Judge

PROTOCOL = Protocol(1, 1, 2, PROMPTS, 1, 2, seed=9)


def node(kind, title="", **inputs):
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title or kind}}


def graph() -> dict:
    return {
        "1": node("LoadImage", "face {reference1}", image="a.png"),
        "2": node("LoadImage", "{reference2}", image="b.png"),
        "3": node("CLIPTextEncode", "Positive {prompt}", text="x", clip=["9", 1]),
        "4": node("CLIPTextEncode", "Negative", text="bad", clip=["9", 1]),
        "5": node("KSampler", "Sampler", seed=1, steps=3, positive=["3", 0]),
        "6": node("EmptyLatentImage", "{samples}", width=64, height=64, batch_size=1),
        "7": node("Apply", "Apply {strength:weight_b}", weight_a=1.0, weight_b=1.0),
        "8": node("SaveImage", images=["5", 0]),
    }


@pytest.fixture
def serve():
    running = []

    def start(execute, **kw):
        running.append(FakeComfyUI(execute, **kw))
        return running[-1]

    yield start
    for server in running:
        server.close()


def shown(asked: dict, uploads: dict) -> dict:
    """As many pictures as the batch, coloured by the seed and the strength."""
    count = asked["6"]["inputs"]["batch_size"]
    seed, weight = asked["5"]["inputs"]["seed"], asked["7"]["inputs"]["weight_b"]
    pictures = []
    for i in range(count):
        picture = torch.zeros(3, 64, 64)
        picture[0], picture[1], picture[2] = seed / 100, weight / 10, i / 10
        pictures.append(encode(picture))
    return {"8": pictures}


def test_slots_are_found_by_title_input_name_and_binding():
    slots = Workflow(graph()).slots
    assert slots == {
        "reference1": ("1", "image"),
        "reference2": ("2", "image"),
        "prompt": ("3", "text"),
        "samples": ("6", "batch_size"),
        "strength": ("7", "weight_b"),
        "seed": ("5", "seed"),  # the only input of that name
    }
    bound = Workflow(graph(), parse_bindings(["strength=Sampler.steps", "prompt=4.text"]))
    assert bound.slots["strength"] == ("5", "steps") and bound.slots["prompt"] == ("4", "text")
    assert bound.digest() != Workflow(graph()).digest() == Workflow(graph()).digest()


def test_filling_leaves_the_workflow_alone():
    workflow = Workflow(graph())
    filled = workflow.fill({"prompt": "p", "seed": 7, "strength": 0.5, "unknown": 1})
    assert filled["3"]["inputs"]["text"] == "p" and filled["5"]["inputs"]["seed"] == 7
    assert filled["3"]["inputs"]["clip"] == ["9", 1]
    assert filled["7"]["inputs"] == {"weight_a": 1.0, "weight_b": 0.5}
    assert workflow.graph == graph()


def broken(change) -> dict:
    changed = graph()
    change(changed)
    return changed


@pytest.mark.parametrize(
    ("changed", "bindings", "words"),
    [
        ({"nodes": [], "links": []}, {}, "API form"),
        ([], {}, "API form"),
        ({"1": {"inputs": {}}}, {}, "API form"),
        (broken(lambda g: g.pop("3")), {}, "prompt"),
        (broken(lambda g: g.pop("5")), {}, "seed"),
        (broken(lambda g: (g.pop("1"), g.pop("2"))), {}, "reference1"),
        (broken(lambda g: g.pop("1")), {}, "[2]"),
        (broken(lambda g: g["4"]["_meta"].update(title="{prompt}")), {}, "two slots"),
        (broken(lambda g: g["4"]["_meta"].update(title="{colour}")), {}, "{colour}"),
        (broken(lambda g: g["8"]["_meta"].update(title="{strength}")), {}, "two slots"),
        (graph(), {"prompt": "99.text"}, "'99'"),
        (graph(), {"prompt": "3.clip"}, "clip"),
        (graph(), {"colour": "3.text"}, "'colour'"),
    ],
)
def test_workflows_without_their_slots_are_refused(changed, bindings, words):
    assert words in sentence(Workflow, changed, bindings)


def test_files_that_are_no_workflow(tmp_path):
    assert "nothing.json" in sentence(load_workflow, tmp_path / "nothing.json")
    (tmp_path / "bad.json").write_text("{")
    assert "bad.json" in sentence(load_workflow, tmp_path / "bad.json")
    assert "prompt:3" in sentence(parse_bindings, ["prompt:3"])


def test_a_run_uploads_fills_waits_and_fetches(serve):
    server = serve(shown)
    characters = {c.name: c for c in draw_characters(PROTOCOL)}
    method = ComfyMethod("theirs", Workflow(graph()), Client(server.address), (0.0, 2.0))
    assert method.weights == (0.0, 2.0)
    runs = list(PROTOCOL.runs(list(characters)))
    (drawn,) = method.draw(runs[:1], characters, 2.0)
    assert drawn.shape == (2, 3, 64, 64)
    for sample in range(2):
        expected = torch.tensor([runs[0].seed / 100, 0.2, sample / 10])
        torch.testing.assert_close(drawn[sample, :, 0, 0], expected, atol=0.003, rtol=0)
    (asked,) = server.prompts
    assert asked["3"]["inputs"]["text"] == runs[0].prompt
    references = characters[runs[0].character].references
    for number, loader in ((0, "1"), (1, "2")):
        name = asked[loader]["inputs"]["image"]
        sent = decode(server.uploads[name])
        torch.testing.assert_close(sent, references[number].image, atol=0.003, rtol=0)
    method.draw(runs[1:2], characters, 2.0)
    assert len(server.uploads) == 2 and server.prompts[1]["5"]["inputs"]["seed"] == runs[1].seed


def test_without_a_batch_size_each_sample_is_a_run(serve):
    def one(asked, uploads):
        asked = {**asked, "6": node("E", batch_size=1)}
        return shown(asked, uploads)

    server = serve(one)
    plain = broken(lambda g: (g["6"]["_meta"].update(title=""), g["7"]["_meta"].update(title="")))
    method = ComfyMethod("theirs", Workflow(plain), Client(server.address), (1.0,))
    assert method.weights == (None,)
    characters = {c.name: c for c in draw_characters(PROTOCOL)}
    (drawn,) = method.draw(list(PROTOCOL.runs(list(characters)))[:1], characters, None)
    seeds = [asked["5"]["inputs"]["seed"] for asked in server.prompts]
    assert drawn.shape[0] == 2 and len(set(seeds)) == 2


FAILED = {
    "outputs": {},
    "status": {
        "status_str": "error",
        "messages": [
            ["execution_start", {}],
            [
                "execution_error",
                {"node_id": "5", "node_type": "KSampler", "exception_message": "out of\nmemory."},
            ],
        ],
    },
}
INTERRUPTED = {"outputs": {}, "status": {"messages": [["execution_interrupted", {}]]}}
REFUSED = {
    "error": {"type": "t", "message": "Prompt outputs failed validation", "details": ""},
    "node_errors": {
        "5": {
            "class_type": "KSampler",
            "errors": [{"message": "Value not in list", "details": "sampler_name: 'x'"}],
        }
    },
}


@pytest.mark.parametrize(
    ("execute", "more", "words"),
    [
        (lambda *_: FAILED, {}, "out of memory"),
        (lambda *_: INTERRUPTED, {}, "interrupted"),
        (shown, {"refusal": REFUSED}, "Value not in list"),
        (lambda *_: {"8": []}, {}, "0 pictures"),
        (lambda *_: {"8": [b"no png", b"no png"]}, {}, "no picture"),
    ],
)
def test_what_goes_wrong_at_the_server_is_told(serve, execute, more, words):
    server = serve(execute, **more)
    characters = {c.name: c for c in draw_characters(PROTOCOL)}
    method = ComfyMethod("theirs", Workflow(graph()), Client(server.address))
    runs = list(PROTOCOL.runs(list(characters)))[:1]
    assert words in sentence(method.draw, runs, characters, None)


def test_no_server_and_no_address():
    assert "127.0.0.1:9" in sentence(Client("http://127.0.0.1:9").run, graph())
    assert "'localhost'" in sentence(Client, "localhost")


def test_a_slow_run_ends_with_the_timeout(serve):
    server = serve(lambda *_: {"8": []})
    server.history = lambda number: {}
    assert "0.2 seconds" in sentence(Client(server.address, 0.2).run, graph())


def test_too_few_references(serve):
    server = serve(shown)
    more = {**graph(), "10": node("LoadImage", "{reference3}", image="c.png")}
    characters = {c.name: c for c in draw_characters(PROTOCOL)}
    method = ComfyMethod("theirs", Workflow(more), Client(server.address))
    runs = list(PROTOCOL.runs(list(characters)))[:1]
    assert "3 references" in sentence(method.draw, runs, characters, None)


def test_results_of_the_server_join_the_table(serve, tmp_path, capsys):
    Judge().save(tmp_path / bundles.JUDGE_FILE)
    server = serve(shown)
    (tmp_path / "w.json").write_text(json.dumps(graph()))
    arguments = ["--out", str(tmp_path / "out"), "--no-core", "--server", server.address]
    arguments += ["--weights", str(tmp_path)]
    arguments += ["--in-domain", "0", "--held-out", "1", "--seeds", "1", "--samples", "2"]
    arguments += ["--workflow", f"theirs={tmp_path / 'w.json'}", "--strengths", "0.5", "1"]
    assert evaluate_dolls.main([*arguments, "--references", "2", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert [(line["method"], line["weight"]) for line in lines] == [("theirs", 0.5), ("theirs", 1)]
    assert len(server.prompts) == 2 * 5
