"""The training-free mode in the host: its own U-Net, samplers, memory and other packs' patches."""

from __future__ import annotations

import comfy.lora
import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import pytest
import torch
from making import (
    TINY_SD15,
    FakeCLIP,
    FakeVAE,
    checkpoint,
    conditioning,
    encoded,
    model_from,
    noise,
    paperdoll_base,
    randomised,
    same_weights,
    sample,
    watch_loading,
    weights_of,
)
from retrieval_pack.nodes.host import base_model, step_context
from retrieval_pack.nodes.host import encoded_references as references
from retrieval_pack.nodes.host.apply import apply_references
from retrieval_pack.nodes.host.attention import attend
from retrieval_pack.nodes.host.conditioning import make_vector_conditioning
from retrieval_pack.nodes.host.joint_application import POST_CFG
from retrieval_pack.nodes.host.loading import find_patcher_class
from retrieval_pack.nodes.host.paperdoll_host import HostVAE, convert_config, make_clip, make_model
from retrieval_pack.nodes.host.self_attention import JointAttention
from retrieval_pack.nodes.host.training_free_model import use_training_free
from retrieval_pack.nodes.load_retrieval_controlnet import (
    TRAINING_FREE,
    RetrievalControlNetLoader,
)
from retrieval_pack.retrieval_core import training_free as core
from retrieval_pack.retrieval_core.bank.bank_file import load_references, save_references
from retrieval_pack.retrieval_core.bank.encoding import split_features
from retrieval_pack.retrieval_core.bank.site_bank import make_bank
from retrieval_pack.retrieval_core.bank.tokens import MATCHED, join_references
from retrieval_pack.retrieval_core.data.prepare import prepare
from retrieval_pack.retrieval_core.errors import RetrievalError
from retrieval_pack.retrieval_core.network.unet import UNet, UNetConfig
from retrieval_pack.retrieval_core.paperdoll.model import load_base
from retrieval_pack.retrieval_core.sampling.controls import Controls, StrengthCurve
from retrieval_pack.retrieval_core.sampling.presets import PRESETS
from retrieval_pack.retrieval_core.sampling.sampler import make_guided_denoiser
from retrieval_pack.retrieval_core.sampling.sampler import sample as core_sample

STEPS, CFG = 4, 2.0


@pytest.fixture(scope="module")
def model():
    return model_from(checkpoint(TINY_SD15))


@pytest.fixture(scope="module")
def net(model):
    return use_training_free(model, "all", 2)


@pytest.fixture(scope="module")
def refs(net):
    with torch.inference_mode():
        return encoded(net, 2)


def close(a, b, tolerance=1e-4):
    """Equal but for float32 rounding, relative to the latent's size."""
    assert (a - b).abs().max() <= tolerance * b.abs().max(), float((a - b).abs().max())


def attn1(model) -> dict:
    held = model.model_options["transformer_options"].get("patches_replace", {})
    return held.get("attn1", {})


def joint(model) -> JointAttention:
    return next(p for p in attn1(model).values() if isinstance(p, JointAttention))


def at_step(sampling, negative):
    return step_context.StepContext(sampling, torch.ones(1), (8, 8), {}, negative)


def left_half(size: int = 64) -> torch.Tensor:
    mask = torch.zeros(1, size, size)
    mask[..., : size // 2] = 1
    return mask


# The node and the encoding.


def test_the_node_loads_it_and_refuses_bad_choices(model):
    def load(**chosen):
        standard = {"layers": "all", "noise_levels": 1, "match_statistics": False}
        network = {"network": TRAINING_FREE, **standard, **chosen}
        return RetrievalControlNetLoader.execute(model, network)

    net = load(layers="decoder", noise_levels=3, match_statistics=True).args[0]
    assert net.network.names == ("output_0.0", "output_1.0") and net.base == "sd15"
    assert net.network.adain and len(net.network.timesteps()) == 3
    for wrong in ({"layers": "ceiling"}, {"noise_levels": 0}):
        with pytest.raises(RetrievalError) as caught:
            load(**wrong)
        assert str(next(iter(wrong.values()))) in str(caught.value) and "\n" not in str(
            caught.value
        )


def test_a_reference_costs_one_pass_for_each_level_and_is_remembered(model, net):
    calls = []
    before, options = weights_of(model), str(model.model_options)
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        first = encoded(net, 2)
        assert len(calls) == 4
        vae, clip = FakeVAE(), FakeCLIP(768)
        one = encoded(net, 1, vae=vae, clip=clip)
        again = encoded(net, 1, vae=vae, clip=clip, weight=2.0)
        assert len(calls) == 6 and again.encoded[0].weight == 2.0
        site = next(iter(one.encoded[0].tokens))
        assert again.encoded[0].tokens[site] is one.encoded[0].tokens[site]
        assert torch.equal(first.encoded[0].tokens[site], one.encoded[0].tokens[site])
    finally:
        handle.remove()
    assert same_weights(model, before) and str(model.model_options) == options


def test_masked_tokens_are_left_out(net):
    whole, part = encoded(net, 1), encoded(net, 1, masks=left_half())
    for site, read in whole.encoded[0].tokens.items():
        assert read.device.type == "cpu"
        if site.startswith(MATCHED):  # their keys stay, and say what is not the subject
            keys, values = part.encoded[0].tokens[site].unflatten(1, (8, 8))
            assert keys.any(-1).all() and not values[:, 4:].any() and values[:, :4].any(-1).all()
        else:
            assert part.encoded[0].tokens[site].shape == (2, read.shape[1] // 2, read.shape[2])


def test_a_lora_changes_what_is_read_but_not_the_fingerprint(net, refs):
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
    model = model_from(checkpoint(TINY_SD15))
    changed = model.clone()
    changed.add_patches({key: ("diff", (0.1 * noise(320, 320, seed=9),))})
    with_lora = use_training_free(changed, "all", 2)
    assert with_lora.maker.fingerprint == net.maker.fingerprint
    site, before = "input_1.0@250", weights_of(model)
    assert not torch.equal(
        encoded(with_lora, 1).encoded[0].tokens[site], refs.encoded[0].tokens[site]
    )
    assert not same_weights(model, before)  # the LoRA's are in the model, in place
    base_model._fingerprints.clear()
    assert use_training_free(model, "all", 2).maker.fingerprint == net.maker.fingerprint
    other = use_training_free(model_from(checkpoint(TINY_SD15, seed=5)), "all", 2)
    assert other.maker.fingerprint != net.maker.fingerprint


def test_references_of_another_checkpoint_are_refused_and_both_are_named(refs):
    other = model_from(checkpoint(TINY_SD15, seed=5))
    named = r"\(weights (\w{8})\) than .* \(weights (?!\1)\w{8}\); connect the same checkpoint"
    with pytest.raises(RetrievalError, match=named):
        apply_references(other, refs, 1.0)


def test_clip_and_vae_of_another_base_are_refused(net):
    with pytest.raises(RetrievalError, match="text of width 1024"):
        encoded(net, clip=FakeCLIP(1024))
    with pytest.raises(RetrievalError, match="latents of 12 channels"):
        encoded(net, vae=FakeVAE(12))


# Sampling.


def test_strength_0_no_references_and_unpatching_are_bit_identical(model, net, refs):
    before, plain = weights_of(model), sample(model)
    patched = apply_references(model, refs, 1.0)
    assert not torch.equal(sample(patched), plain)
    muted = Controls(groups=(0.0, 0.0, 0.0), token_budget=None)
    for nothing in (
        apply_references(model, refs, 0.0),
        apply_references(model, type(refs)(net), 1.0),
        apply_references(model, refs, 1.0, controls=muted),
    ):
        assert torch.equal(sample(nothing), plain)
        assert not attn1(nothing) and POST_CFG not in nothing.model_options
    assert torch.equal(sample(model), plain)
    assert same_weights(model, before) and not attn1(model)
    assert not model.wrappers and not model.callbacks


def test_a_clone_shares_the_patch_and_the_bank_is_dropped(model, refs):
    patched = apply_references(model, refs, 1.0, region=left_half())
    clone = patched.clone()
    assert attn1(clone) is not attn1(patched) and joint(clone) is joint(patched)
    (application,) = joint(patched).applications
    seen = []

    def look(h, hsp, to):
        seen.append((len(application._banks), len(application._regions)))
        return h, hsp

    clone.set_model_output_block_patch(look)
    assert torch.equal(sample(clone), sample(patched))
    assert set(seen) == {(1, 1)}  # of all levels, one at a time
    assert not application._banks and not application._regions


def test_the_estimate_grows_by_the_bank(model, refs, monkeypatch):
    asked = watch_loading(monkeypatch)
    sample(model)
    patched = apply_references(model, refs, 1.0)
    sample(patched)
    (application,) = joint(patched).applications
    level = application.retrieval.bank.nbytes() / 2
    assert asked[1][1] - asked[0][1] >= application.nbytes((1, 4, 8, 8), torch.float32) > level > 0


@pytest.mark.parametrize("guidance", ["cond", "both"])
def test_split_and_reversed_batches_give_the_same(model, refs, guidance, monkeypatch):
    patched = apply_references(model, refs, 1.0, guidance=guidance)
    orders = []

    def spy(h, hsp, to):
        orders.append(tuple(to["cond_or_uncond"]))
        return h, hsp

    patched.set_model_output_block_patch(spy)
    whole = sample(patched)
    with monkeypatch.context() as m:  # too little memory for both prompts at once
        m.setattr(type(model.model), "memory_required", lambda *_, **__: 1e30)
        split = sample(patched)
    close(split, whole)
    assert {(1, 0), (0,), (1,)} <= set(orders)


def test_rows_are_told_apart(model, refs):
    """At one layer: only the conditional rows change, whatever their order and number."""
    q, k, v = (noise(4, 64, 320, seed=i) for i in range(3))
    mine = joint(apply_references(model, refs, 1.0, guidance="cond"))
    noted = step_context.StepContext(
        model.get_model_object("model_sampling"), torch.ones(1), (8, 8), {}, frozenset({1})
    )

    def attended(order):
        extra = {
            "block": ("input", 1), "block_index": 0, "n_heads": 8, "dim_head": 40,
            "activations_shape": [4, 320, 8, 8], "cond_or_uncond": order,
            step_context.STEP: noted,
        }  # fmt: skip
        return mine(q, k, v, extra)

    own = attended([1, 1])
    for order in ([0, 1], [1, 0], [0, 0], [1, 0, 1, 0]):
        rows = 4 // len(order)
        found = attended(order)
        for i, kind in enumerate(order):
            part = slice(i * rows, (i + 1) * rows)
            if kind == 1:
                close(found[part], own[part], 1e-5)
            else:
                assert (found[part] - own[part]).abs().max() > 1e-3


def test_start_end_and_curve_follow_the_hosts_percentages(model, refs):
    plain = sample(model, steps=4)
    between = apply_references(
        model, refs, 1.0, start=0.4, end=0.6
    )  # of steps at 0, 1/3, 2/3 and 1
    assert torch.equal(sample(between, steps=4), plain)
    early = sample(apply_references(model, refs, 1.0, end=0.5), steps=4)
    whole = sample(apply_references(model, refs, 1.0), steps=4)
    assert not torch.equal(early, plain) and not torch.equal(early, whole)
    silent = Controls(StrengthCurve((0.0,)), token_budget=None)
    assert torch.equal(sample(apply_references(model, refs, 1.0, controls=silent), steps=4), plain)


@pytest.fixture(scope="module")
def matching(model):
    """References that no layer attends to: they act on the step's prediction alone."""
    with torch.inference_mode():
        return encoded(use_training_free(model, "none", 1), 2)


def test_without_attention_nothing_but_the_prediction_is_shifted(model, matching):
    """The shift is the same for the network's prediction, which the references do not change."""
    patched, seen = apply_references(model, matching, 1.0), []

    def look(args):
        seen.append((args["cond_denoised"], args["denoised"]))
        return args["denoised"]

    for given in (model, patched):
        looking = given.clone()
        looking.set_model_sampler_post_cfg_function(look)
        assert torch.equal(sample(looking, steps=1, cfg=1.0), sample(given, steps=1, cfg=1.0))
    (plain, unshifted), (predicted, shifted) = seen
    assert torch.equal(plain, unshifted) and torch.equal(plain, predicted)
    assert (shifted - predicted).abs().max() > 1e-3


def test_post_cfg_functions_run_in_the_order_in_which_they_were_added(model, matching):
    """One of another pack before ours and one behind it; a second application takes our place."""

    def double(args):
        return 2 * args["denoised"]

    def negate(args):
        return -args["denoised"]

    first = model.clone()
    first.set_model_sampler_post_cfg_function(double)
    ours = apply_references(first, matching, 1.0)
    ours.set_model_sampler_post_cfg_function(negate)
    again = apply_references(ours, matching, 1.0)
    functions = again.model_options[POST_CFG]
    assert [functions[0], functions[2]] == [double, negate] and len(functions) == 3
    assert len(functions[1].applications) == 2
    assert len(ours.model_options[POST_CFG][1].applications) == 1
    close(sample(again), sample(ours))


def test_another_packs_passes_within_a_step_are_not_matched(model, matching):
    """As perturbed-attention guidance does: a post-CFG function evaluates the model once more."""

    def guide(args):
        conds = [args["cond"]]
        comfy.samplers.calc_cond_batch(
            args["model"], conds, 3 * args["input"], args["sigma"], args["model_options"]
        )
        return args["denoised"]

    other = model.clone()
    other.set_model_sampler_post_cfg_function(guide)
    before = apply_references(other, matching, 1.0)
    behind = apply_references(model, matching, 1.0)
    behind.set_model_sampler_post_cfg_function(guide)
    alone = sample(apply_references(model, matching, 1.0))
    assert torch.equal(sample(before), alone) and torch.equal(sample(behind), alone)


def test_at_cfg_1_the_hosts_zeros_for_the_negative_prompt_are_no_text(model, matching):
    patched, texts = apply_references(model, matching, 1.0), []
    (shift,) = patched.model_options[POST_CFG]
    (application,) = shift.applications
    original = application.shift
    application.shift = lambda x0, text, step: texts.append(text) or original(x0, text, step)
    sample(patched, cfg=1.0, steps=1)
    sample(patched, cfg=3.0, steps=1)
    assert texts[0] is None and texts[1].abs().max() > 0


def test_areas_and_regions_of_the_shift(model, matching):
    area = conditioning(10, area=(8, 4, 0, 4))
    base = sample(model, positive=area, steps=1)
    left = sample(
        apply_references(model, matching, 1.0, region=left_half()), positive=area, steps=1
    )
    close(left, base)
    whole = sample(apply_references(model, matching, 1.0), positive=area, steps=1)
    assert torch.equal(whole[..., :4], base[..., :4])  # where no prompt acts nothing is taken
    assert ((whole - base)[..., 4:].abs() > 1e-4).any()


def test_a_region_elsewhere_than_the_area_changes_nothing_and_the_crop_is_right(model, refs):
    """An area conditioning on the right half and a region on the left half never meet."""
    area = conditioning(10, area=(8, 4, 0, 4))
    patched = apply_references(model, refs, 1.0, region=left_half(), guidance="cond")
    close(sample(patched, positive=area), sample(model, positive=area))
    inside = apply_references(model, refs, 1.0, region=1 - left_half(), guidance="cond")
    everywhere = apply_references(model, refs, 1.0, guidance="cond")
    close(sample(inside, positive=area), sample(everywhere, positive=area))
    assert not torch.equal(sample(inside, positive=area), sample(model, positive=area))


def test_several_applies_add_up(model, net, refs):
    """Two regions, two characters: each place sees its own bank only."""
    other = encoded(net, 1, seed=21)
    first = apply_references(model, refs, 1.0, region=left_half())
    both = apply_references(first, other, 1.0, region=1 - left_half())
    assert len(joint(first).applications) == 1 and len(joint(both).applications) == 2
    second = apply_references(model, other, 1.0, region=1 - left_half())
    q, k, v = (noise(1, 64, 320, seed=i) for i in range(3))
    sampling = model.get_model_object("model_sampling")
    extra = {
        "block": ("middle", 0), "block_index": 0, "n_heads": 8, "dim_head": 40,
        "activations_shape": [1, 320, 8, 8], "cond_or_uncond": [0],
        step_context.STEP: at_step(sampling, frozenset()),
    }  # fmt: skip
    found = [joint(m)(q, k, v, extra).view(8, 8, 320) for m in (both, first, second)]
    close(found[0][:, :3], found[1][:, :3], 1e-5)
    close(found[0][:, 5:], found[2][:, 5:], 1e-5)
    assert not torch.equal(sample(both), sample(first))


@pytest.mark.parametrize("shape", [(8, 12), (7, 9), (16, 6)])
def test_latents_of_other_sizes_than_the_references(model, refs, shape):
    latent = torch.zeros(2, 4, *shape)
    patched = apply_references(model, refs, 0.7, region=left_half())
    assert sample(patched, latent).isfinite().all()


def test_beside_other_patches_of_the_same_layers(model, refs):
    """A hypernetwork, and a pack that has replaced the middle layer and records what it sees."""
    calls = {"hypernetwork": 0, "replaced": 0}

    def hypernetwork(q, k, v, extra):
        calls["hypernetwork"] += 1
        return q, k * 1.1, v * 0.9

    def replaced(q, k, v, extra):
        calls["replaced"] += 1
        return attend(q, k, v, extra["n_heads"]) * 1.5

    others = model.clone()
    others.set_model_attn1_patch(hypernetwork)
    others.set_model_attn1_replace(replaced, "middle", 0, 0)
    plain = sample(others)
    before = dict(calls)
    out = sample(apply_references(others, refs, 1.0))
    assert calls["hypernetwork"] == 2 * before["hypernetwork"]
    assert calls["replaced"] == 2 * before["replaced"]
    assert out.isfinite().all() and not torch.equal(out, plain)
    assert torch.equal(sample(apply_references(others, refs, 0.0)), plain)
    assert torch.equal(sample(others), plain)


def test_tokens_that_others_tiled_leave_no_place_for_a_region(model, refs):
    """As HyperTile does: four tiles of a quarter of the places, in the batch."""
    mine = joint(apply_references(model, refs, 1.0, region=left_half()))
    everywhere = joint(apply_references(model, refs, 1.0))
    q, k, v = (noise(8, 16, 320, seed=i) for i in range(3))
    sampling = model.get_model_object("model_sampling")
    extra = {
        "block": ("output", 0), "block_index": 0, "n_heads": 8, "dim_head": 40,
        "activations_shape": [2, 320, 8, 8], "cond_or_uncond": [1, 0],
        step_context.STEP: at_step(sampling, frozenset({1})),
    }  # fmt: skip
    own = attend(q, k, v, 8)
    assert torch.equal(mine(q, k, v, extra), own)
    close(everywhere(q, k, v, extra)[:4], own[:4], 1e-5)
    assert (everywhere(q, k, v, extra)[4:] - own[4:]).abs().max() > 1e-3


def test_saved_then_loaded_samples_bit_for_bit(model, net, refs, tmp_path):
    path = tmp_path / "her.safetensors"
    save_references(path, refs.encoded, net.maker)
    loaded = references.References(net, tuple(load_references(path, net.maker)))
    one, other = (sample(apply_references(model, r, 1.0)) for r in (refs, loaded))
    assert torch.equal(one, other)


# SDXL's vector conditioning goes the host's own way.


def test_sdxl_with_a_vector_conditioning():
    config = UNetConfig(
        320, (1,), (1,), (1,), 1, 2048, num_head_channels=64, use_linear_in_transformer=True,
        adm_in_channels=2816,
    )  # fmt: skip
    arguments = {"num_classes": "sequential", **convert_config(config)}
    settings = comfy.supported_models.SDXL(arguments)
    settings.set_inference_dtype(torch.float32, None)
    built = comfy.model_base.SDXL(settings, device=torch.device("cpu"))
    built.diffusion_model.load_state_dict(randomised(UNet(config), 0).state_dict())
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(built, load_device=cpu, offload_device=cpu)
    seen = []
    handle = built.diffusion_model.register_forward_pre_hook(
        lambda module, args, kw: seen.append(kw["y"]), with_kwargs=True
    )
    net = use_training_free(model, "all", 1)
    clip = FakeCLIP(2048, pooled=1280)
    refs = encoded(net, 1, clip=clip)
    handle.remove()
    (y,) = seen
    _, pooled = clip.encode_from_tokens("figure", return_pooled=True)
    assert torch.equal(y[:, :1280], pooled)
    sizes = make_vector_conditioning(pooled, 64, 2816)
    close(y, sizes, 1e-5)
    positive, negative = (
        [[noise(1, 7, 2048, seed=s), {"pooled_output": noise(1, 1280, seed=s)}]] for s in (1, 2)
    )
    patched = apply_references(model, refs, 1.0)
    out = sample(patched, positive=positive, negative=negative)
    assert out.isfinite().all()
    assert not torch.equal(out, sample(model, positive=positive, negative=negative))


# Parity.

CASES = {
    "two": dict(count=2),
    "masks and weights": dict(count=4, masks=True, weights=(0.3, 1.7, 0.0, 1.0)),
    "both rows, part of sampling": dict(count=2, guidance="both", start=0.25, end=0.8),
    "region, strength": dict(count=2, region=True, strength=2.5),
    "statistics": dict(count=2, masks=True, adain=True),
    "no layer attends, character first": dict(
        count=2, layers="none", masks=True, preset="character first"
    ),
    "cfg 1, prompt first": dict(count=1, cfg=1.0, preset="prompt first"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    paperdoll_base(path)
    return load_base(path)


def pictures(count: int):
    drawn = torch.rand(count, 80, 48, 3, generator=torch.Generator().manual_seed(4))
    masks = torch.zeros(count, 40, 24)
    for i in range(count):
        masks[i, 4 + i : 30, 3 : 18 + i] = 1
    return drawn, masks


def in_the_core(base, count, masks, weights, adain, strength, layers, cfg, preset, **kw):
    network = core.TrainingFree.from_unet(
        base.unet, "paperdoll", layers=layers, levels=2, adain=adain
    )
    drawn, selected = pictures(count)
    prepared = [
        prepare(drawn[i], selected[i] if masks else None, "face", weights[i]) for i in range(count)
    ]
    latents = base.vae.encode(torch.stack([p.image for p in prepared]))
    context = base.text.encode(["face"] * count)
    features = core.record(base.unet, base.schedule, network, latents, context)
    features = {site: features[site] for site in network.maker.sites}
    made = split_features(features, latents.shape[2:], [p.mask for p in prepared], weights)
    retrieval = core.JointRetrieval(
        make_bank(join_references(made), None, network.site_downsampling()),
        strength,
        names=core.name_layers(base.unet),
        match_layer=network.match_layer,
        preset=PRESETS[preset],
        timesteps=network.timesteps(),
        adain=adain,
        **kw,
    )
    cond, uncond = base.text.encode(["standing, smile"] * 2), base.text.encode([""] * 2)
    denoise = make_guided_denoiser(base.unet, base.schedule, cond, uncond, cfg, [retrieval])
    latents = core_sample(denoise, noise(2, 24, 16, 16), base.schedule, STEPS, "ddim")
    return network, made, base.vae.decode(latents).movedim(1, -1)


def in_the_host(
    base, count, masks, weights, adain, strength, layers, cfg, start=0.0, end=1.0, **kw
):
    model, clip, vae = make_model(base, find_patcher_class()), make_clip(base), HostVAE(base.vae)
    net = use_training_free(model, layers, 2, adain)
    drawn, selected = pictures(count)
    refs = references.References(net)
    for i in range(count):
        mask = selected[i : i + 1] if masks else None
        more = references.encode_references(
            net, drawn[i : i + 1], vae, clip, "face", weights[i], mask, automatic=False
        )
        refs = references.References(net, (*refs.encoded, *more))
    patched = apply_references(model, refs, strength, start, end, **kw)
    sigmas = torch.cat([base.schedule.sigmas()[base.schedule.timesteps(STEPS)], torch.zeros(1)])
    cond, uncond = (
        [[clip.encode_from_tokens(clip.tokenize(text)), {}]] for text in ("standing, smile", "")
    )
    latents = comfy.sample.sample_custom(
        patched,
        noise(2, 24, 16, 16),
        cfg,
        comfy.samplers.sampler_object("euler"),
        sigmas.float(),
        cond,
        uncond,
        torch.zeros(2, 24, 16, 16),
        disable_pbar=True,
    )
    return net, refs, vae.decode(latents)


@pytest.mark.parametrize("case", CASES)
def test_host_equals_core(base, case):
    chosen = {
        "masks": False,
        "weights": (1.0,) * 4,
        "adain": False,
        "strength": 1.0,
        "layers": "all",
        "cfg": CFG,
        "preset": "balanced",
        **CASES[case],
    }
    if chosen.pop("region", False):
        chosen["region"] = torch.zeros(16, 16)
        chosen["region"][:, 5:] = 1
    chosen["weights"] = chosen["weights"][: chosen["count"]]
    network, made, expected = in_the_core(base, **chosen)
    net, refs, found = in_the_host(base, **chosen)
    assert net.maker.fingerprint == network.fingerprint
    for ours, theirs in zip(refs.encoded, made, strict=True):
        for site, read in theirs.tokens.items():
            close(ours.tokens[site], read)
    largest = float((found - expected).abs().max())
    print(f"\nparity, {case}: largest difference {largest:.2e} of {expected.std():.2f}")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    *_, plain = in_the_core(base, **{**chosen, "strength": 0.0})
    assert (expected - plain).abs().max() > 1e-3
