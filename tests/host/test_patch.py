"""The patch on SD 1.5's real architecture, beside everything else that patches a model."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import comfy.controlnet
import comfy.lora
import comfy.samplers
import comfy.sd
import pytest
import torch
from making import (
    SD15,
    checkpoint,
    conditioning,
    encoded,
    images,
    loaded,
    model_from,
    noise,
    same_weights,
    sample,
    watch_loading,
    weights_of,
)
from retrieval_pack.nodes.host import step_context
from retrieval_pack.nodes.host.apply import apply_references
from retrieval_pack.nodes.host.skip_patch import RetrievalPatch


@pytest.fixture(scope="module")
def weights():
    return checkpoint(SD15)


@pytest.fixture(scope="module")
def model(weights):
    return model_from(weights)


@pytest.fixture(scope="module")
def net(model, tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("net"), model, SD15, "sd15")


@pytest.fixture(scope="module")
def refs(net):
    with torch.inference_mode():
        return encoded(net, 2)


def close(a, b, tolerance=1e-4):
    """Equal but for float32 rounding, relative to the latent's size."""
    assert (a - b).abs().max() <= tolerance * b.abs().max(), float((a - b).abs().max())


def test_strength_0_no_references_and_unpatching_are_bit_identical(model, net, refs):
    before, plain = weights_of(model), sample(model)
    patched = apply_references(model, refs, 1.0)
    assert not torch.equal(sample(patched), plain)
    for nothing in (
        apply_references(model, refs, 0.0),
        apply_references(model, type(refs)(net), 1.0),
    ):
        assert torch.equal(sample(nothing), plain)
        assert "patches" not in nothing.model_options["transformer_options"]
    assert torch.equal(sample(model), plain)
    assert same_weights(model, before)
    assert "patches" not in model.model_options["transformer_options"]
    assert not model.wrappers and not model.callbacks


def test_a_clone_shares_the_patch_and_nothing_else(model, refs):
    patched = apply_references(model, refs, 1.0)
    clone = patched.clone()
    ours = patched.model_options["transformer_options"]["patches"]["output_block_patch"]
    theirs = clone.model_options["transformer_options"]["patches"]["output_block_patch"]
    assert ours is not theirs and ours[0] is theirs[0]
    assert torch.equal(sample(clone), sample(patched))
    assert clone.model_patches_models() == []  # sampling needs no other model than the user's


def test_sampling_calls_no_layer_of_the_network_and_drops_the_devices_copies(model, net, refs):
    patched = apply_references(model, refs, 1.0)
    mine = patched.model_options["transformer_options"]["patches"]["output_block_patch"][0]
    seen, called = [], []

    def look(h, hsp, to):
        seen.append(len(mine._device))
        return h, hsp

    patched.set_model_output_block_patch(look)
    layers = [layer for half in (net.encoder, net.sites) for layer in half.model.modules()]
    handles = [layer.register_forward_pre_hook(lambda *_: called.append(1)) for layer in layers]
    try:
        sample(patched)
    finally:
        for handle in handles:
            handle.remove()
    assert all(seen) and seen and not called
    assert not mine._device


def test_threads_share_a_patch(model, refs):
    """As a host does that samples clones of a model on several devices at once."""
    patched = apply_references(model, refs, 1.0, region=left_half())
    mine = patched.model_options["transformer_options"]["patches"]["output_block_patch"][0]
    context = step_context.StepContext(
        model.model.model_sampling, torch.ones(1), (8, 8), {}, frozenset({1})
    )
    h, hsp = noise(2, 640, 4, 4), noise(2, 640, 4, 4, seed=1)
    to = {"block": ("output", 0), "cond_or_uncond": [0, 1], step_context.STEP: context}
    alone = mine(h, hsp, to)
    mine.cleanup()

    def one_device(kind):
        with torch.inference_mode():
            found = [mine(h.to(kind), hsp.to(kind), to) for _ in range(20)]
        mine.cleanup()  # the host calls it for each clone, when the others may still be at work
        return found

    with ThreadPoolExecutor(4) as pool:
        kinds = [torch.float32, torch.float64] * 4
        found = list(pool.map(one_device, kinds))
    for kind, results in zip(kinds, found, strict=True):
        for result in results:
            for tensor, expected in zip(result, alone, strict=True):
                assert tensor.dtype == kind
                close(tensor.float(), expected)


@pytest.mark.parametrize("guidance", ["cond", "both"])
def test_split_and_reversed_batches_give_the_same(model, refs, guidance, monkeypatch):
    patched = apply_references(model, refs, 1.0, guidance=guidance)
    whole = sample(patched)
    with monkeypatch.context() as m:  # too little memory for both prompts at once
        m.setattr(type(model.model), "memory_required", lambda *_, **__: 1e30)
        split = sample(patched)
    close(split, whole)
    orders = []
    original = comfy.samplers.can_concat_cond

    def spy(h, hsp, to):
        orders.append(tuple(to["cond_or_uncond"]))
        return h, hsp

    watched = patched.clone()
    watched.set_model_output_block_patch(spy)
    sample(watched)
    with monkeypatch.context() as m:
        m.setattr(comfy.samplers, "can_concat_cond", lambda a, b: a is b and original(a, b))
        sample(watched)
    assert {(1, 0), (0,), (1,)} <= set(orders)


def test_only_the_positive_prompt_retrieves_in_every_guider(model, refs):
    """Rows by what the guider calls them: DualCFGGuider puts the negative prompt at index 0."""
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    rows = []
    patched = apply_references(model, refs, 1.0, guidance="cond")
    mine = patched.model_options["transformer_options"]["patches"]["output_block_patch"][0]
    add_retrieved = type(mine.retrieval).add_retrieved

    def spy(self, site, h, kinds, strength):
        rows.append(tuple(kinds))
        return add_retrieved(self, site, h, kinds, strength)

    guider = Guider_DualCFG(patched)
    guider.set_conds(conditioning(1), conditioning(2), conditioning(3))
    guider.set_cfg(2.0, 1.5)
    latent = torch.zeros(1, 4, 8, 8)
    sigmas = torch.tensor([10.0, 0.0])
    orders = []
    patched.set_model_output_block_patch(
        lambda h, hsp, to: (orders.append(tuple(to["cond_or_uncond"])), (h, hsp))[1]
    )
    with pytest.MonkeyPatch.context() as m:
        m.setattr(type(mine.retrieval), "add_retrieved", spy)
        guider.sample(
            noise(1, 4, 8, 8), latent, comfy.samplers.sampler_object("euler"), sigmas, seed=0
        )
    assert rows
    for order, kinds in zip(orders[:1], rows[:1]):
        assert [kind == 1 for kind in kinds] == [index == 0 for index in order]


def test_cfg_1_and_batches(model, refs):
    patched = apply_references(model, refs, 1.0)
    one = sample(patched, cfg=1.0)
    assert not torch.equal(one, sample(model, cfg=1.0))
    latent = torch.zeros(3, 4, 8, 8)
    three = sample(patched, latent)
    assert three.shape == latent.shape and not torch.equal(three[0], three[1])


@pytest.mark.parametrize("shape", [(8, 12), (7, 9), (16, 6)])
def test_latents_of_other_sizes_than_the_references(model, refs, shape):
    latent = torch.zeros(1, 4, *shape)
    assert sample(apply_references(model, refs, 1.0), latent).isfinite().all()


@pytest.mark.parametrize(
    "sampler", ["euler", "euler_ancestral", "heun", "dpmpp_2m_sde", "uni_pc", "lcm", "ddim"]
)
def test_samplers(model, refs, sampler):
    out = sample(apply_references(model, refs, 1.0), sampler=sampler)
    assert out.isfinite().all() and not torch.equal(out, sample(model, sampler=sampler))


def left_half(size: int = 64) -> torch.Tensor:
    mask = torch.zeros(1, size, size)
    mask[..., : size // 2] = 1
    return mask


def attended(model, refs_and_regions, **kw):
    patched = model
    for refs, region in refs_and_regions:
        patched = apply_references(patched, refs, 1.0, region=region)
    return sample(patched, **kw)


def test_several_applies_add_up(model, net, refs):
    """At one site and step, two patches add what each adds alone."""
    other = encoded(net, 1, seed=21)
    patches = []
    for r, region in ((refs, left_half()), (other, 1 - left_half())):
        patched = apply_references(model, r, 1.0, region=region)
        patches += patched.model_options["transformer_options"]["patches"]["output_block_patch"]
    h, hsp = noise(2, 640, 4, 4), noise(2, 640, 4, 4, seed=1)
    noted = step_context.StepContext(
        model.model.model_sampling, torch.ones(1), (8, 8), {}, frozenset({1})
    )
    to = {"block": ("output", 0), "cond_or_uncond": [1, 0], step_context.STEP: noted}
    alone = [p(h, hsp, to) for p in patches]
    both = patches[1](*patches[0](h, hsp, to), to)
    # The second query sees the first's result, so equality holds where the first added nothing:
    # in the outer columns, because the regions meet softly in the two inner ones.
    right, left = (..., slice(3, 4)), (..., slice(0, 1))
    assert torch.equal(alone[0][1][right], hsp[right])
    assert torch.equal(both[1][right], alone[1][1][right])
    assert torch.equal(alone[1][1][left], hsp[left])
    assert torch.equal(both[1][left], alone[0][1][left])
    assert not torch.equal(both[1], hsp)
    assert torch.equal(both[1][0], hsp[0])  # row 0 is the negative prompt
    whole = attended(model, [(refs, left_half()), (other, 1 - left_half())])
    assert not torch.equal(whole, attended(model, [(refs, left_half())]))
    assert not torch.equal(whole, attended(model, [(other, 1 - left_half())]))


def test_a_region_elsewhere_than_the_area_changes_nothing_and_the_crop_is_right(model, refs):
    """An area conditioning on the right half and a region on the left half never meet."""
    area = conditioning(10, area=(8, 4, 0, 4))
    patched = apply_references(model, refs, 1.0, region=left_half(), guidance="cond")
    assert torch.equal(sample(patched, positive=area), sample(model, positive=area))
    inside = apply_references(model, refs, 1.0, region=1 - left_half(), guidance="cond")
    everywhere = apply_references(model, refs, 1.0, guidance="cond")
    close(sample(inside, positive=area), sample(everywhere, positive=area))
    assert not torch.equal(sample(inside, positive=area), sample(model, positive=area))


def test_two_areas_in_one_batch_are_cropped_each_for_itself(model, refs):
    areas = conditioning(10, area=(8, 4, 0, 0)) + conditioning(12, area=(8, 4, 0, 4))
    orders = []
    patched = apply_references(model, refs, 1.0, region=left_half(), guidance="cond")
    patched.set_model_output_block_patch(
        lambda h, hsp, to: (orders.append(len(to["cond_or_uncond"])), (h, hsp))[1]
    )
    out = sample(patched, positive=areas)
    assert max(orders) >= 4  # both crops, positive and negative, in one batch
    only_left = apply_references(model, refs, 1.0, guidance="cond")
    assert not torch.equal(out, sample(model, positive=areas))
    assert not torch.equal(out, sample(only_left, positive=areas))


def test_start_and_end_follow_the_hosts_percentages(model, refs):
    """As ControlNet's: at every step whose sigma lies between those of the two percentages."""
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    original = RetrievalPatch._add

    def acted(start, end):
        every, added = set(), set()

        def spy(h, hsp, to):
            every.add(float(to["sigmas"][0]))
            return h, hsp

        def noting(self, site, h, to, *rest):
            added.add(float(to["sigmas"][0]))
            return original(self, site, h, to, *rest)

        patched = apply_references(model, refs, 1.0, start=start, end=end)
        patched.set_model_output_block_patch(spy)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(RetrievalPatch, "_add", noting)
            sample(patched, steps=4)
        assert added == {s for s in every if to_sigma(end) <= s <= to_sigma(start)}
        return len(added), len(every)

    assert acted(0.0, 1.0) == (4, 4)
    assert acted(0.0, 0.5) == (2, 4)
    assert acted(0.5, 1.0) == (2, 4)
    assert acted(0.4, 0.6) == (0, 4)
    never = apply_references(model, refs, 1.0, start=0.4, end=0.6)
    assert torch.equal(sample(never, steps=4), sample(model, steps=4))


def test_beside_other_patches_of_the_same_model(model, refs):
    """IP-Adapter-like attn2 patches, hypernetworks and output patches neither lose nor gain."""
    calls = {"attn2": 0, "attn1": 0, "output": 0}

    def attn2(q, k, v, extra):  # as an IP-Adapter of the older kind: more tokens to look at
        calls["attn2"] += 1
        return q, torch.cat([k, 0.5 * k], 1), torch.cat([v, 0.5 * v], 1)

    class Hypernetwork:
        def __call__(self, q, k, v, extra):
            calls["attn1"] += 1
            return q, k * 1.1, v * 0.9

        def to(self, device):
            return self

    def output(h, hsp, to):
        calls["output"] += 1
        return h * 1.02, hsp * 0.98

    def others(m):
        m = m.clone()
        m.set_model_attn2_patch(attn2)
        m.set_model_attn1_patch(Hypernetwork())
        m.set_model_output_block_patch(output)
        return m

    both = sample(apply_references(others(model), refs, 1.0))
    assert all(calls.values())
    assert not torch.equal(both, sample(others(model)))
    assert not torch.equal(both, sample(apply_references(model, refs, 1.0)))
    assert torch.equal(sample(apply_references(others(model), refs, 0.0)), sample(others(model)))
    assert both.isfinite().all()


def test_beside_a_controlnet(model, refs, weights):
    class Control:
        """A ControlNet's residuals at every skip and in the middle."""

        def __init__(self, scale):
            self.scale, self.extra_hooks, self.previous_controlnet = scale, None, None
            self.multigpu_clones = {}

        def get_control(self, x, t, cond, batched, to):
            rows, edge = x.shape[0], x.shape[-1]
            shapes = [(320, edge), (320, edge), (320, edge // 2), (640, edge // 2)]
            output = [self.scale * noise(rows, c, e, e, seed=i) for i, (c, e) in enumerate(shapes)]
            middle = self.scale * noise(rows, 640, edge // 2, edge // 2)
            return {"output": output, "middle": [middle]}

        def get_models(self):
            return []

        def inference_memory_requirements(self, dtype):
            return 0

        def pre_run(self, *_):
            pass

        def cleanup(self):
            pass

        def get_extra_hooks(self):
            return []

    patched = apply_references(model, refs, 1.0)
    with_control = conditioning(10, control=Control(0.5))
    out = sample(patched, positive=with_control)
    assert not torch.equal(out, sample(patched))
    assert not torch.equal(out, sample(model, positive=with_control))
    silent = conditioning(10, control=Control(0.0))
    close(sample(patched, positive=silent), sample(patched))


def test_a_lora_loaded_by_the_host(model, refs):
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{name}.lora_up.weight": noise(320, 4), f"{name}.lora_down.weight": noise(4, 320)}
    before = weights_of(model)
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    assert keys.get(name, key) == key
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0)
    assert with_lora.patches
    out = sample(apply_references(with_lora, refs, 1.0))
    later, _ = comfy.sd.load_lora_for_models(apply_references(model, refs, 1.0), None, lora, 0.8, 0)
    assert torch.equal(sample(later), out)
    assert not torch.equal(out, sample(apply_references(model, refs, 1.0)))
    sample(model)
    assert same_weights(model, before)


def test_the_estimate_grows_by_bank_and_activations(model, refs, monkeypatch):
    patched = apply_references(model, refs, 1.0)
    asked = watch_loading(monkeypatch)
    sample(model)
    sample(patched)
    mine = patched.model_options["transformer_options"]["patches"]["output_block_patch"][0]
    bank = mine.retrieval.bank.nbytes()
    assert asked[1][1] - asked[0][1] >= mine.nbytes((1, 4, 8, 8), torch.float32) > bank > 0


def test_making_a_bank_loads_the_sites_and_asks_for_room(net, refs, monkeypatch):
    asked = watch_loading(monkeypatch)
    again = type(refs)(refs.network, refs.encoded)
    made = again.bank()
    ((models, memory),) = asked
    assert models == [net.sites]
    largest = max(2 * site.keys.numel() for site in made.sites.values())
    assert memory >= 4 * largest
    assert again.bank() is made and len(asked) == 1  # kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_every_type(model, tmp_path, monkeypatch, dtype):
    from making import core_network
    from retrieval_pack.nodes.host import loading
    from retrieval_pack.nodes.host.trained_network import load_network

    path = tmp_path / "small.safetensors"
    core_network(SD15, "sd15").save(path, dtype)
    full = load_network(path, model)
    expected = encoded(full)
    monkeypatch.setattr(loading.management, "unet_dtype", lambda *_, **__: dtype)
    again = tmp_path / "again.safetensors"
    path.rename(again)
    net = load_network(again, model)
    assert next(net.network.parameters()).dtype == dtype
    refs = encoded(net)
    read = refs.encoded[0].tokens["middle"]
    assert read.dtype == net.compute_dtype
    close(read.float(), expected.encoded[0].tokens["middle"], 2e-2)
    assert refs.bank().sites["middle"].keys.dtype == net.compute_dtype
    assert sample(apply_references(model, refs, 1.0)).isfinite().all()


def test_only_what_changed_is_encoded_again(model, net):
    from making import FakeCLIP, FakeVAE
    from retrieval_pack.nodes.host.encoded_references import encode_references

    vae, clip = FakeVAE(), FakeCLIP()

    def encode(batch, weight=1.0, concept="figure", mask=None):
        return encode_references(net, batch, vae, clip, concept, weight, mask, 64)

    first = encode(images(2))
    assert vae.calls == 1
    heavier = encode(images(2), weight=2.0)
    assert vae.calls == 1 and [r.weight for r in heavier] == [2.0, 2.0]
    assert heavier[0].tokens["middle"] is first[0].tokens["middle"]
    encode(torch.cat([images(2), images(1, seed=9)]))
    assert vae.calls == 2
    encode(images(2), concept="face")
    encode(images(2), mask=left_half())
    assert vae.calls == 4
    same = images(1).repeat(3, 1, 1, 1)
    assert len(encode(same)) == 3
    gc.collect()
