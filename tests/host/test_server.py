"""The paper-doll workflow on a running server, posted as the frontend posts it."""

from __future__ import annotations

import json
from urllib.parse import quote

import numpy as np
import pytest
import torch
from released import describe_nodes
from serving import NAME, has_weights, messages, with_inputs
from workflows import api_form, example, the_node

SAVE = "retrieval/paperdoll_same_character"
BATCH, STEPS = 2, 3


@pytest.fixture(scope="module")
def whole(node_info):
    """The workflow as it was saved."""
    return api_form(example("Demo - Same character"), node_info)


@pytest.fixture(scope="module")
def prompt(whole):
    """With few pictures and steps, because it runs often."""
    made = with_inputs(whole, the_node(whole, "RetrievalPaperdollModel"), batch_size=BATCH)
    for key, node in whole.items():
        if node["class_type"] == "KSampler":
            made = with_inputs(made, key, steps=STEPS)
    return made


def pictures(server, prompt: dict, entry: dict) -> np.ndarray:
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])
    return server.images(entry, the_node(prompt, "SaveImage", filename_prefix=SAVE))


def failure(entry: dict) -> str:
    """The sentence on the node that failed."""
    assert entry["status"]["status_str"] == "error"
    (error,) = messages(entry, "execution_error")
    return error["exception_message"].strip()


@pytest.fixture(scope="module")
def first(server, prompt):
    """The workflow's own pictures, before anything went wrong."""
    return pictures(server, prompt, server.run(prompt))


def test_pictures_come_out_and_again_from_the_cache(server, prompt, first):
    assert first.shape == (BATCH, 256, 256, 3) and first.std() > 5
    again = server.run(prompt)
    assert again["status"]["status_str"] == "success"
    (cached,) = messages(again, "execution_cached")
    assert set(cached["nodes"]) == set(prompt)


def test_only_what_changed_runs_again(server, prompt, first):
    apply = the_node(prompt, "RetrievalApplyReferences")
    plain = the_node(prompt, "SaveImage", filename_prefix=f"{SAVE}_without")
    # Saved anew, since 0.8.0 does not tell what a cached node saved.
    again = with_inputs(prompt, plain, filename_prefix=f"{SAVE}_again")
    entry = server.run(with_inputs(again, apply, strength=0.0))
    (cached,) = messages(entry, "execution_cached")
    assert the_node(prompt, "RetrievalEncodeReferences") in cached["nodes"]
    assert apply not in cached["nodes"]
    off = pictures(server, prompt, entry)
    assert not np.array_equal(off, first)
    # The lower row is the same seed without references: the base model, bit for bit.
    assert np.array_equal(off, server.images(entry, plain))


def broken_prompts(prompt: dict):
    apply = the_node(prompt, "RetrievalApplyReferences")
    nothing = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 64, "height": 64}}
    empty = with_inputs(prompt, apply, region=["mask", 0])
    yield {**empty, "mask": nothing}, "region"
    positive = prompt[the_node(prompt, "KSampler", model=[apply, 0])]["inputs"]["positive"][0]
    yield with_inputs(prompt, positive, text="waving, flying"), "flying"
    encode = the_node(prompt, "RetrievalEncodeReferences")
    image = {"class_type": "LoadImage", "inputs": {"image": "broken.png"}}
    yield {**with_inputs(prompt, encode, images=["load", 0]), "load": image}, ""


def test_after_a_broken_prompt_the_next_one_is_right(server, prompt, first):
    broken = server.log.parent / "input" / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    sampler = the_node(prompt, "KSampler", model=[the_node(prompt, "RetrievalApplyReferences"), 0])
    for i, (wrong, word) in enumerate(broken_prompts(prompt)):
        text = failure(server.run(wrong))
        assert word in text
        assert not word or (text.endswith(".") and "\n" not in text), text
        # Another number of steps first, so that the right pictures are made anew.
        server.run(with_inputs(prompt, sampler, steps=1, seed=i))
        assert np.array_equal(pictures(server, prompt, server.run(prompt)), first)


def test_after_an_interruption_the_next_one_is_right(server, prompt, first):
    sampler = the_node(prompt, "KSampler", model=[the_node(prompt, "RetrievalApplyReferences"), 0])
    stopped = server.queue(with_inputs(prompt, sampler, steps=900))
    server.wait(lambda: server.json("/queue")["queue_running"])

    def interrupted():
        server.post("/interrupt", {})
        return server.finished(stopped)

    entry = server.wait(interrupted)
    assert messages(entry, "execution_interrupted")
    assert np.array_equal(pictures(server, prompt, server.run(prompt)), first)


def test_the_pack_as_published_is_found_with_its_nodes_templates_and_pages(server, node_info):
    assert {name for name in node_info if name.startswith("Retrieval")} == describe_nodes().keys()
    names = server.json("/workflow_templates")[NAME]
    assert "Demo - Same character" in names
    for name in names:
        assert json.loads(server.get(f"/api/workflow_templates/{NAME}/{quote(name)}.json"))["nodes"]
    for node in (n for n in node_info if n.startswith("Retrieval")):
        assert server.get(f"/extensions/{NAME}/docs/{node}.md").startswith(b"# ")


@pytest.mark.skipif(not has_weights(), reason="retrieval_core/paperdoll/weights has no files yet")
@pytest.mark.parametrize(
    ("characters", "batch"),
    [(4, 8), pytest.param(16, 16, marks=pytest.mark.slow)],
    ids=["quick", "slow"],
)
def test_attributes_match_as_in_the_core(server, whole, characters, batch):
    """The same characters, prompts and noise in both; the host's steps differ by rounding."""
    from retrieval_pack.nodes.host.paperdoll_host import draw_references
    from retrieval_pack.retrieval_core.data.prepare import prepare
    from retrieval_pack.retrieval_core.paperdoll.bundle import load_bundle
    from retrieval_pack.retrieval_core.paperdoll.generate import (
        Sampling,
        apply_bank,
        encode_group,
        generate,
    )
    from retrieval_pack.retrieval_core.paperdoll.measure import (
        compute_chance_levels,
        measure_matches,
    )

    bundle = load_bundle()
    prompt = with_inputs(whole, the_node(whole, "RetrievalPaperdollModel"), batch_size=batch)
    del prompt[the_node(prompt, "SaveImage", filename_prefix=f"{SAVE}_without")]
    apply = the_node(prompt, "RetrievalApplyReferences")
    sampler = the_node(prompt, "KSampler", model=[apply, 0])
    settings = prompt[sampler]["inputs"]
    strength, end = (prompt[apply]["inputs"][name] for name in ("strength", "end_percent"))
    how = Sampling(settings["steps"], settings["cfg"], settings["sampler_name"], strength, end=end)
    cases, in_host, in_core, differences = [], [], [], []
    for character in range(characters):
        text = prompts(character)
        asked = with_inputs(prompt, settings["positive"][0], text=text)
        drawn = the_node(prompt, "RetrievalPaperdollReference")
        asked = with_inputs(asked, drawn, character=character)
        asked = with_inputs(asked, sampler, seed=character)
        ours = pictures(server, asked, server.run(asked))[:, ::4, ::4]
        ours = torch.from_numpy(ours).movedim(-1, 1).float() / 255
        images, _, _ = draw_references(character, "figure", 4)
        tokens = encode_group(
            bundle.base, bundle.network, [prepare(image, None, "figure") for image in images]
        )
        noise = bundle.base.noise(batch, torch.Generator().manual_seed(character))
        retrieval = apply_bank(bundle.network, tokens, how)
        theirs = generate(bundle, [text] * batch, noise, retrieval, how)
        differences.append(float((ours - theirs).abs().mean()))
        in_host += bundle.judge.read(ours)
        in_core += bundle.judge.read(theirs)
        cases += [character_case(character)] * batch
    host, core = measure_matches(cases, in_host), measure_matches(cases, in_core)
    print(f"\n{len(cases)} figures; mean difference of pixels {np.mean(differences):.5f}")
    print(f"attribute match in the host: {host}\nattribute match in the core: {core}")
    assert abs(host["mean"] - core["mean"]) <= 2
    assert core["mean"] > compute_chance_levels()["mean"] + 10


def prompts(character: int) -> str:
    from retrieval_pack.retrieval_core.paperdoll.world import random_scene

    return ", ".join(random_scene(np.random.default_rng([character, 40])).tags())


def character_case(character: int):
    """The truth of a character of the node Paper-Doll Reference."""
    from retrieval_pack.nodes.host.paperdoll_host import draw_character
    from retrieval_pack.retrieval_core.paperdoll.cases import Case
    from retrieval_pack.retrieval_core.paperdoll.judge import FACE, GARMENTS, list_truth
    from retrieval_pack.retrieval_core.paperdoll.world import Figure, random_scene

    rng = np.random.default_rng([character, 30])
    who, clothes = draw_character(rng)
    values = list_truth(Figure(who, clothes, random_scene(rng)))
    return Case("", [], {name: values[name] for name in (*FACE, *GARMENTS)}, {}, "", [])
