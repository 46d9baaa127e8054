"""Consistent Pictures in the host: its own U-Net, samplers, prompts and other patches."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import pytest
import torch
from dolls import Dolls
from making import (
    SD15,
    checkpoint,
    conditioning,
    model_from,
    noise,
    same_weights,
    watch_loading,
    weights_of,
)
from making import sample as sample_sd
from retrieval_pack.nodes.consistent_pictures import RetrievalConsistentPictures
from retrieval_pack.nodes.host import step_context
from retrieval_pack.nodes.host.apply import apply_references
from retrieval_pack.nodes.host.shared_subjects import SharedSubjects, share_subjects
from retrieval_pack.nodes.host.training_free_model import use_training_free
from retrieval_pack.retrieval_core.errors import RetrievalError
from retrieval_pack.retrieval_core.sampling.sampler import make_guided_denoiser
from retrieval_pack.retrieval_core.sampling.sampler import sample as sample_in_the_core
from retrieval_pack.retrieval_core.training_free import consistent_batch as core

CFG, STEPS, ROWS = 2.0, 4, 3
WHOLE = {"start": 0.0, "end": 1.0}


@pytest.fixture(scope="module")
def dolls(tmp_path_factory):
    with torch.inference_mode():
        return Dolls(tmp_path_factory.mktemp("dolls"))


@pytest.fixture(scope="module")
def model():
    return model_from(checkpoint(SD15))


@pytest.fixture(scope="module")
def consistent(model):
    return share_subjects(model, 1.0, **WHOLE)


def sample(model, rows=ROWS, **kw):
    return sample_sd(model, torch.zeros(rows, 4, 8, 8), **kw)


def close(a, b, tolerance=1e-4):
    """Equal but for float32 rounding, relative to the latent's size."""
    assert (a - b).abs().max() <= tolerance * b.abs().max(), float((a - b).abs().max())


def patches_of(model) -> list:
    held = model.model_options["transformer_options"].get("patches", {})
    return held.get("output_block_patch", [])


def test_strength_0_and_a_batch_of_one_are_bit_for_bit_the_base(model, consistent):
    before, plain = weights_of(model), sample(model)
    off = RetrievalConsistentPictures.execute(model, 0.0, 0, 0.0, 0.5).args[0]
    assert torch.equal(sample(off), plain) and not patches_of(off)
    assert torch.equal(sample(consistent, rows=1), sample(model, rows=1))
    assert not torch.equal(sample(consistent), plain)
    assert torch.equal(sample(model), plain)
    assert same_weights(model, before) and not patches_of(model)


def test_only_rows_of_positive_prompts_change_in_any_order(model, consistent):
    (patch,) = patches_of(consistent)
    h, skip = noise(6, 320, 8, 8), noise(6, 320, 8, 8, seed=1)
    sampling = model.get_model_object("model_sampling")
    context = step_context.StepContext(sampling, torch.ones(1), (8, 8), {}, frozenset({1}))
    alone = patch.batch.share(h[:3])
    for order in ([0, 1], [1, 0]):
        to = {"block": ("output", 3), "cond_or_uncond": order, step_context.STEP: context}
        rows = torch.cat([h[:3] if kind == 0 else h[3:] for kind in order])
        shared, other = patch(rows, skip, to)
        found = dict(zip(order, shared.chunk(2)))
        assert torch.equal(found[0], alone) and torch.equal(found[1], h[3:])
        assert other is skip
    coarsest = {"block": ("output", 0), "cond_or_uncond": [0], step_context.STEP: context}
    assert patch(h, skip, coarsest)[0] is h


def test_prompts_split_by_memory_give_the_same(model, consistent, monkeypatch):
    orders = []

    def spy(h, hsp, to):
        orders.append(tuple(to["cond_or_uncond"]))
        return h, hsp

    spied = consistent.clone()
    spied.set_model_output_block_patch(spy)
    whole = sample(spied)
    with monkeypatch.context() as m:  # too little memory for both prompts at once
        m.setattr(type(model.model), "memory_required", lambda *_, **__: 1e30)
        split = sample(spied)
    close(split, whole)
    assert {(1, 0), (0,), (1,)} <= set(orders)


def test_an_anchor_is_its_own_picture_and_the_others_follow_it(model):
    followed = share_subjects(model, 1.0, 1, **WHOLE)
    plain, found = sample(model), sample(followed)
    close(found[:1], plain[:1])
    assert (found - plain)[1:].flatten(1).abs().amax(1).min() > 1e-3
    more = sample(share_subjects(model, 1.0, 2, **WHOLE), rows=4)
    fewer = sample(share_subjects(model, 1.0, 2, **WHOLE), rows=2)
    close(more[:2], fewer)


def test_a_row_of_the_conditioning_for_each_picture_is_its_prompt(model, consistent):
    """The host gives row i of a conditioning to picture i."""
    rows = [conditioning(seed)[0][0] for seed in (20, 21, 22)]
    each = [[torch.cat(rows), {}]]
    plain = sample(model, positive=each)
    close(plain[1:2], sample(model, positive=[[rows[1], {}]])[1:2])
    found = sample(consistent, positive=each)
    assert not torch.equal(found, plain)
    assert not torch.equal(found, sample(consistent, positive=[[rows[0], {}]]))


def test_start_and_end_follow_the_hosts_percentages(model, consistent):
    plain = sample(model, steps=4)  # at 0, 1/3, 2/3 and 1
    assert torch.equal(sample(share_subjects(model, 1.0, start=0.4, end=0.6), steps=4), plain)
    early = sample(share_subjects(model, 1.0, end=0.5), steps=4)
    assert not torch.equal(early, plain)
    assert not torch.equal(early, sample(consistent, steps=4))


def test_an_area_of_the_prompt_shares_within_itself(model, consistent):
    area = conditioning(10, area=(8, 4, 0, 4))
    found = sample(consistent, positive=area)
    assert found.isfinite().all() and not torch.equal(found, sample(model, positive=area))


@pytest.mark.parametrize("shape", [(8, 12), (7, 9), (16, 6)])
def test_latents_of_any_shape(consistent, shape):
    assert sample_sd(consistent, torch.zeros(2, 4, *shape)).isfinite().all()


def test_beside_references_loras_and_other_packs_patches(dolls):
    def halved(h, hsp, to):
        return h, 0.5 * hsp

    def replaced(q, k, v, extra):
        return v

    key = "diffusion_model.output_blocks.2.1.transformer_blocks.0.attn1.to_q.weight"
    shape = dolls.model.model.state_dict()[key].shape
    lora = dolls.model.clone()
    assert lora.add_patches({key: ("diff", (noise(*shape),))}, 0.5)
    others = dolls.model.clone()
    others.set_model_output_block_patch(halved)
    others.set_model_attn1_replace(replaced, "output", 2)
    with torch.inference_mode():
        trained = apply_references(dolls.model, dolls.references(2), 1.0)
        free_network = use_training_free(dolls.model)
        from making import images
        from retrieval_pack.nodes.host import encoded_references as references

        made = references.encode_references(
            free_network, images(2), dolls.vae, dolls.clip, "figure"
        )
        free = apply_references(dolls.model, references.References(free_network, made), 1.0)
        for patched in (lora, others, trained, free):
            plain = dolls.sample(patched, rows=2)
            found = dolls.sample(share_subjects(patched, 1.0, **WHOLE), rows=2)
            assert found.isfinite().all() and not torch.equal(found, plain)
            assert torch.equal(dolls.sample(share_subjects(patched, 0.0), rows=2), plain)
        references_later = apply_references(
            share_subjects(dolls.model, 1.0, **WHOLE), dolls.references(2), 1.0
        )
        earlier = dolls.sample(share_subjects(trained, 1.0, **WHOLE), rows=2)
        close(dolls.sample(references_later, rows=2), earlier)


def test_clones_share_the_patch(consistent):
    clone = consistent.clone()
    assert patches_of(clone) == patches_of(consistent)
    assert isinstance(patches_of(clone)[0], SharedSubjects)


def test_the_estimate_of_memory_grows(model, consistent, monkeypatch):
    asked = watch_loading(monkeypatch)
    sample(model)
    sample(consistent)
    (patch,) = patches_of(consistent)
    assert asked[1][1] - asked[0][1] >= patch.nbytes((ROWS, 4, 8, 8), torch.float32) > 0


def test_other_architectures_are_refused_in_one_sentence(monkeypatch):
    flux = type("Flux", (), {})()

    class Patcher:
        model = flux

        def get_model_object(self, name):
            return torch.nn.Identity()

    with pytest.raises(RetrievalError, match="retrieval does not support") as caught:
        share_subjects(Patcher(), 1.0)
    assert "\n" not in str(caught.value)


def test_a_start_behind_the_end_is_refused_before_queueing():
    validate = RetrievalConsistentPictures.validate_inputs
    assert validate(start_percent=0.0, end_percent=0.5) is True
    assert validate(start_percent=None, end_percent=0.5) is True
    assert "start at 0.6 and end at 0.5" in validate(start_percent=0.6, end_percent=0.5)


@pytest.mark.parametrize("anchors", [0, 1])
def test_host_equals_core(dolls, anchors):
    base, settings = dolls.base, core.ConsistentBatch(0.8, 0.0, 0.7, anchors)
    cond, uncond = base.text.encode(["standing, smile"] * ROWS), base.text.encode([""] * ROWS)
    drawn = noise(ROWS, 24, 16, 16)
    denoise = make_guided_denoiser(base.unet, base.schedule, cond, uncond, CFG)
    with torch.inference_mode(), core.share_subjects(base.unet, settings, 1, ROWS):
        expected = sample_in_the_core(denoise, drawn, base.schedule, STEPS, "ddim")
    plain = sample_in_the_core(denoise, drawn, base.schedule, STEPS, "ddim")
    sigmas = torch.cat([base.schedule.sigmas()[base.schedule.timesteps(STEPS)], torch.zeros(1)])
    found = comfy.sample.sample_custom(
        share_subjects(dolls.model, 0.8, anchors, 0.0, 0.7),
        drawn,
        CFG,
        comfy.samplers.sampler_object("euler"),
        sigmas.float(),
        dolls.text("standing, smile"),
        dolls.text(""),
        torch.zeros(ROWS, 24, 16, 16),
        disable_pbar=True,
    )
    close(found, expected, 1e-3)
    assert (expected - plain).abs().max() > 0.05 * plain.abs().max()
