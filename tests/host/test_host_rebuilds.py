"""What the host does with models beside sampling: rebuilds them, compiles, trains, loads lazily."""

from __future__ import annotations

import itertools

import comfy.model_management as management
import comfy.model_patcher
import pytest
import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel
from comfy_extras.nodes_train import TrainLoraNode
from dolls import Dolls
from making import (
    TINY_SD15,
    checkpoint,
    core_network,
    encoded,
    loaded,
    model_from,
    noise,
    sample,
)
from retrieval_pack.nodes.host import trained_network
from retrieval_pack.nodes.host.apply import apply_references
from retrieval_pack.nodes.host.base_model import fingerprint_base
from retrieval_pack.nodes.host.trained_network import load_network
from retrieval_pack.nodes.host.training_free_model import use_training_free
from retrieval_pack.retrieval_core.errors import RetrievalError
from retrieval_pack.retrieval_core.files import read_safetensors, save_safetensors

KEY = "diffusion_model.input_blocks.1.0.in_layers.2.weight"


@pytest.fixture(scope="module")
def dolls(tmp_path_factory):
    return Dolls(tmp_path_factory.mktemp("dolls"))


def lazy_states() -> list[bool]:
    """Whether layers start without weights: both where the host knows such layers."""
    try:
        import comfy.memory_management as memory
    except ImportError:
        return [False]
    return [False, True] if hasattr(memory, "aimdo_enabled") else [False]


def test_a_bases_fingerprint_is_of_the_file_alone(monkeypatch):
    weights, found = checkpoint(TINY_SD15), set()
    for lazy, with_lora, sampled in itertools.product(lazy_states(), (False, True), (False, True)):
        if len(lazy_states()) > 1:
            monkeypatch.setattr("comfy.memory_management.aimdo_enabled", lazy)
        model = model_from(weights)
        if with_lora:
            model.add_patches({KEY: ("diff", (noise(320, 320, 3, 3),))}, 0.7)
        if sampled:
            sample(model, steps=1)
        found.add(fingerprint_base(model))
    assert len(found) == 1
    assert fingerprint_base(model_from(checkpoint(TINY_SD15, seed=1))) not in found


def test_the_host_rebuilds_the_paper_doll_model_from_its_file(dolls):
    load, arguments = dolls.model.cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    assert type(again) is comfy.model_patcher.ModelPatcher and again.model is not dolls.model.model
    assert torch.equal(dolls.sample(again), dolls.sample(dolls.model))


def test_a_compiled_model_retrieves_as_a_plain_one(dolls, monkeypatch):
    compiled, compile_module = [], torch.compile

    def eager(graph, inputs):
        compiled.append(graph)
        return graph.forward

    # Traced as for every backend, but not handed to a C++ compiler.
    monkeypatch.setattr(torch, "compile", lambda model, **kw: compile_module(model, backend=eager))
    patched = apply_references(dolls.model, dolls.references(), 1.0)
    expected = dolls.sample(patched)
    found = TorchCompileModel.execute(patched, "inductor").args[0]
    torch.testing.assert_close(dolls.sample(found), expected, atol=1e-4, rtol=1e-4)
    assert compiled and not torch.equal(dolls.sample(dolls.model), expected)


def test_the_lora_trainer_takes_the_paper_doll_model(dolls):
    before = dolls.sample(dolls.model)
    values = {
        one.id: [one.default if one.default is not None else one.options[0]]
        for one in TrainLoraNode.define_schema().inputs
        if getattr(one, "default", None) is not None or getattr(one, "options", None)
    }
    values |= {
        "model": [dolls.model],
        "latents": [{"samples": noise(2, 24, 16, 16)}],
        "positive": [dolls.text("standing, smile")],
        "steps": [2],
        "rank": [2],
        "training_dtype": ["fp32"],
        "lora_dtype": ["fp32"],
    }
    # Before them 0.8.0 has the model.
    lora, losses, steps = TrainLoraNode.execute(**values).args[-3:]
    assert steps == 2 and len(losses["loss"]) == 2
    assert all(torch.tensor(losses["loss"]).isfinite()) and len(lora) > 10
    assert torch.equal(dolls.sample(dolls.model), before)


def test_misshapen_missing_and_unknown_weights_are_refused_before_loading(tmp_path):
    model = model_from(checkpoint(TINY_SD15))
    core_network(TINY_SD15, "sd15").save(tmp_path / "net.safetensors")
    tensors, metadata = read_safetensors(tmp_path / "net.safetensors")
    key = "retrieval.input_0.to_q.weight"
    wrong = {
        "shape": {**tensors, key: tensors[key].T[:10].contiguous()},
        "lacks": {k: v for k, v in tensors.items() if k != key},
        "unexpected": {**tensors, "retrieval.input_0.more": tensors[key].clone()},
    }
    for word, changed in wrong.items():
        path = tmp_path / f"{word}.safetensors"
        save_safetensors(path, changed, metadata)
        with pytest.raises(RetrievalError) as caught:
            load_network(path, model)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)


def test_the_next_load_after_an_interrupted_one_is_right(tmp_path, monkeypatch):
    model = model_from(checkpoint(TINY_SD15))
    core_network(TINY_SD15, "sd15").save(tmp_path / "net.safetensors")
    expected = sample(apply_references(model, encoded(fresh(tmp_path, model)), 1.0))
    trained_network._networks.clear()

    def stop(*_, **__):
        raise management.InterruptProcessingException

    with monkeypatch.context() as patch:
        patch.setattr(trained_network, "load_weights", stop)
        with pytest.raises(management.InterruptProcessingException):
            fresh(tmp_path, model)
    found = sample(apply_references(model, encoded(fresh(tmp_path, model)), 1.0))
    assert torch.equal(found, expected)


def fresh(tmp_path, model):
    return load_network(tmp_path / "net.safetensors", model)


def test_strength_1_is_what_the_file_recommends(tmp_path):
    model = model_from(checkpoint(TINY_SD15))
    network = core_network(TINY_SD15, "sd15")
    network.save(tmp_path / "plain.safetensors")
    network.card.recommended["strength"] = 1.5
    network.save(tmp_path / "net.safetensors")
    plain = load_network(tmp_path / "plain.safetensors", model)
    found = sample(apply_references(model, encoded(fresh(tmp_path, model)), 1.0))
    assert torch.equal(found, sample(apply_references(model, encoded(plain), 1.5)))
    assert not torch.equal(found, sample(apply_references(model, encoded(plain), 1.0)))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_references_of_another_precision_than_the_model(tmp_path, kind):
    model = model_from(checkpoint(TINY_SD15))
    net = loaded(tmp_path, model, TINY_SD15, "sd15")
    references = encoded(net)
    expected = sample(apply_references(model, references, 1.0))
    half = type(references)(
        net,
        tuple(
            type(one)({k: t.to(kind) for k, t in one.tokens.items()}, latent_size=one.latent_size)
            for one in references.encoded
        ),
    )
    found, plain = sample(apply_references(model, half, 1.0)), sample(model)
    assert found.dtype == expected.dtype
    assert (found - expected).norm() < 0.1 * (expected - plain).norm()


def test_training_free_references_are_of_one_checkpoint():
    model, other = model_from(checkpoint(TINY_SD15)), model_from(checkpoint(TINY_SD15, seed=9))
    references = encoded(use_training_free(model, levels=1))
    with pytest.raises(RetrievalError) as caught:
        apply_references(other, references, 1.0)
    text = str(caught.value)
    assert "checkpoint" in text and text.endswith(".") and "\n" not in text
    with_lora = model.clone()
    with_lora.add_patches({KEY: ("diff", (0.01 * noise(320, 320, 3, 3),))}, 1.0)
    apply_references(with_lora, references, 1.0)
