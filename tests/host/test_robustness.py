"""After an interruption or a failed allocation the next run is right; memory does not grow."""

from __future__ import annotations

import gc

import comfy.model_management as management
import psutil
import pytest
import torch
from making import (
    TINY_SD15,
    FakeCLIP,
    FakeVAE,
    checkpoint,
    encoded,
    images,
    loaded,
    model_from,
    same_weights,
    sample,
    weights_of,
)
from retrieval_pack.nodes.host import encoded_references
from retrieval_pack.nodes.host.apply import apply_references
from retrieval_pack.nodes.host.encoded_references import References, encode_references
from retrieval_pack.retrieval_core.bank.site_bank import Bank
from retrieval_pack.retrieval_core.sampling.frozen_site import FrozenSite


@pytest.fixture(scope="module")
def model():
    return model_from(checkpoint(TINY_SD15))


@pytest.fixture(scope="module")
def net(model, tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("net"), model, TINY_SD15, "sd15", decoder=True)


def ours(patched):
    return patched.model_options["transformer_options"]["patches"]["output_block_patch"][0]


def test_an_interruption_while_sampling(model, net):
    refs, before = encoded(net), weights_of(model)
    plain, patched = sample(model), apply_references(model, refs, 1.0)
    right = sample(patched)
    steps = []

    def stop(h, hsp, to):
        steps.append(float(to["sigmas"][0]))
        if len(set(steps)) == 2:
            management.interrupt_current_processing()
            management.throw_exception_if_processing_interrupted()
        return h, hsp

    stopped = patched.clone()
    stopped.set_model_output_block_patch(stop)
    with pytest.raises(management.InterruptProcessingException):
        sample(stopped)
    assert not ours(patched)._device
    assert torch.equal(sample(patched), right)
    assert torch.equal(sample(model), plain)
    assert same_weights(model, before)


def test_an_interruption_while_encoding(net):
    vae, clip = FakeVAE(), FakeCLIP()
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        encode_references(net, images(2), vae, clip, "figure", size=64)
    assert len(encode_references(net, images(2), vae, clip, "figure", size=64)) == 2


def test_a_failing_allocation(model, net, monkeypatch):
    refs = encoded(net)
    plain, patched = sample(model), apply_references(model, refs, 1.0)
    right = sample(patched)

    def fail(*_, **__):
        raise torch.cuda.OutOfMemoryError("simulated")

    with monkeypatch.context() as m:
        m.setattr(Bank, "to", fail)
        with pytest.raises(management.OOM_EXCEPTION):
            sample(patched)
    assert not ours(patched)._device
    with monkeypatch.context() as m:
        m.setattr(FrozenSite, "query", fail)
        with pytest.raises(management.OOM_EXCEPTION):
            sample(patched)
    assert not ours(patched)._device
    assert torch.equal(sample(patched), right)
    assert torch.equal(sample(model), plain)


def test_a_failing_allocation_while_encoding(net, monkeypatch):
    def fail(*_, **__):
        raise torch.cuda.OutOfMemoryError("simulated")

    with monkeypatch.context() as m:
        m.setattr(type(net.network.encoder), "forward", fail)
        with pytest.raises(management.OOM_EXCEPTION):
            encoded(net)
    assert len(encoded(net).encoded) == 1


@pytest.mark.parametrize("budget", [None, 7])
def test_a_bank_that_the_device_has_no_room_for_is_made_on_the_cpu(net, monkeypatch, budget):
    refs, layer = encoded(net), type(net.network.retrieval["middle"])
    expected, original, calls = refs.bank(budget), layer.embed_null, []

    def fail_once(self, like):
        calls.append(like.device.type)
        if len(calls) == 3:
            raise torch.cuda.OutOfMemoryError("simulated")
        return original(self, like)

    with monkeypatch.context() as m:
        m.setattr(layer, "embed_null", fail_once)
        made = type(refs)(net, refs.encoded).bank(budget)
    assert len(calls) >= 3 + len(expected.sites) and set(calls[3:]) == {"cpu"}
    for site, bank in expected.sites.items():
        assert torch.equal(made.sites[site].keys, bank.keys)
        assert torch.equal(made.sites[site].values, bank.values)


@pytest.mark.slow
def test_100_runs_with_changing_references_do_not_grow(model, tmp_path, monkeypatch):
    """On a one-level SD 1.5; references, strengths and regions change with every run."""
    # The memory of encoded references is full after a few runs, not after hundreds.
    monkeypatch.setattr(encoded_references, "CACHED_BYTES", 8 << 20)
    net = loaded(tmp_path, model, TINY_SD15, "sd15")
    process = psutil.Process()
    vae, clip = FakeVAE(), FakeCLIP()
    figures = []
    for run in range(100):
        batch = images(1 + run % 3, seed=run)
        more = encode_references(net, batch, vae, clip, "figure", 0.5 + run % 4, size=64)
        region = None if run % 2 else torch.ones(1, 32, 32)
        patched = apply_references(
            model, References(net, more), 0.1 * (run % 7), end=0.5 + run % 2 / 2, region=region
        )
        sample(patched, steps=1)
        if run % 10 == 9:
            gc.collect()
            figures.append(process.memory_info().rss / 2**20)
    print("\nresident MiB after each 10 runs:", " ".join(f"{figure:.0f}" for figure in figures))
    assert max(figures[5:]) - min(figures[3:5]) < 0.02 * figures[4]
