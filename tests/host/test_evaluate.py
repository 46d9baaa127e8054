"""The evaluation against a real ComfyUI: any workflow as a method (tests/evaluate has the rest)."""

from __future__ import annotations

import pytest
import torch

from retrieval_core.errors import RetrievalError
from retrieval_core.evaluate.comfy import Client, ComfyMethod
from retrieval_core.evaluate.protocol import Protocol
from retrieval_core.evaluate.workflow import Workflow
from retrieval_core.paperdoll.doll_characters import PROMPTS, draw_characters

PROTOCOL = Protocol(0, 1, 2, PROMPTS, 1, 2)


def node(kind: str, title: str = "", **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}


def graph() -> dict:
    """Two references, loaded from files, into the demo's model and network."""
    return {
        "model": node("RetrievalPaperdollModel", "{samples:batch_size}", batch_size=1),
        "net": node(
            "RetrievalControlNetLoader", model=["model", 0], network="paper-doll demo (bundled)",
        ),
        "one": node("LoadImage", "{reference1}", image="x.png"),
        "two": node("LoadImage", "{reference2}", image="x.png"),
        "batch": node("ImageBatch", image1=["one", 0], image2=["two", 0]),
        "encode": node(
            "RetrievalEncodeReferences", retrieval_controlnet=["net", 0], images=["batch", 0],
            vae=["model", 2], clip=["model", 1], concept="figure", weight=1.0, size=0,
        ),
        "apply": node(
            "RetrievalApplyReferences", model=["model", 0], references=["encode", 0],
            strength=1.0, start_percent=0.0, end_percent=1.0, guidance="recommended",
        ),
        "yes": node("CLIPTextEncode", "{prompt}", clip=["model", 1], text=""),
        "no": node("CLIPTextEncode", clip=["model", 1], text=""),
        "draw": node(
            "KSampler", model=["apply", 0], positive=["yes", 0], negative=["no", 0],
            latent_image=["model", 3], seed=1, steps=2, cfg=2.0, sampler_name="euler",
            scheduler="sgm_uniform", denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["draw", 0], vae=["model", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="evaluate/run"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def drawn(server):
    characters = {c.name: c for c in draw_characters(PROTOCOL)}
    runs = list(PROTOCOL.runs(list(characters)))[:1]
    method = ComfyMethod("host", Workflow(graph()), Client(server.address), (0.0, 1.0))
    return {weight: method.draw(runs, characters, weight)[0] for weight in method.weights}


def test_a_workflow_draws_the_runs_it_is_asked_for(drawn):
    assert set(drawn) == {0.0, 1.0}
    for pictures in drawn.values():
        assert pictures.shape == (2, 3, 64, 64) and pictures.std() > 0.02
        assert not torch.equal(pictures[0], pictures[1])
    assert not torch.equal(drawn[0.0], drawn[1.0])  # the strength arrived


def test_the_uploaded_references_are_what_is_looked_at(server, drawn):
    """Other references, other pictures; the same ones again, the same pictures."""
    for seed, same in ((PROTOCOL.seed, True), (PROTOCOL.seed + 1, False)):
        other = Protocol(0, 1, 2, PROMPTS, 1, 2, seed=seed)
        characters = {c.name: c for c in draw_characters(other)}
        runs = list(PROTOCOL.runs(list(characters)))[:1]
        method = ComfyMethod("host", Workflow(graph()), Client(server.address), (1.0,))
        (found,) = method.draw(runs, characters, 1.0)
        assert torch.equal(found, drawn[1.0]) == same


@pytest.mark.parametrize(
    ("where", "inputs", "words"),
    [
        ("draw", {"sampler_name": "nonsense"}, "sampler_name"),
        ("yes", {"text": "flying"}, "flying"),
    ],
)
def test_what_the_host_refuses_is_told_in_one_sentence(server, where, inputs, words):
    changed = graph()
    changed[where]["inputs"].update(inputs)
    if where == "yes":
        changed["no"]["_meta"]["title"], changed["yes"]["_meta"]["title"] = "{prompt}", ""
    characters = {c.name: c for c in draw_characters(PROTOCOL)}
    runs = list(PROTOCOL.runs(list(characters)))[:1]
    method = ComfyMethod("host", Workflow(changed), Client(server.address))
    with pytest.raises(RetrievalError, match=words) as caught:
        method.draw(runs, characters, None)
    assert "\n" not in str(caught.value)
