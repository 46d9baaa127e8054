"""The training-free mode: joint self-attention against float64 arithmetic, and what must hold."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from batched_tokens import batch_tokens
from plain_unet import PlainUNet
from reference_maker import describe_maker
from refusal import sentence

from retrieval_core.bank.bank_file import load_references, save_references
from retrieval_core.bank.encoding import split_features
from retrieval_core.bank.site_bank import Bank, make_bank
from retrieval_core.bank.tokens import MATCHED, join_references
from retrieval_core.files import read_safetensors, save_safetensors
from retrieval_core.network.controlnet import Card, RetrievalControlNet
from retrieval_core.network.unet import SD15, SDXL, UNet, UNetConfig, attention
from retrieval_core.sampling.applications import Applications
from retrieval_core.sampling.controls import StrengthCurve
from retrieval_core.sampling.joint_attention import Source, attend_chunks, attend_to
from retrieval_core.sampling.noise_schedule import NoiseSchedule
from retrieval_core.sampling.regions import resize_region
from retrieval_core.sampling.sampler import make_guided_denoiser, sample
from retrieval_core.training_free import (
    LAYER_CHOICES,
    JointRetrieval,
    TrainingFree,
    choose_layers,
    list_self_attention_layers,
    make_fixed_noise,
    name_layers,
    record,
)
from retrieval_core.training_free.attention_layers import NO_LAYERS
from retrieval_core.training_free.training_free_network import find_nearest, name_site

CONFIG = UNetConfig(32, (1, 2), (1, 1), (1, 1), 2, 16, num_head_channels=16)
SCHEDULE = NoiseSchedule()
ALL = tuple(list_self_attention_layers(CONFIG))


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_unet(seed, dtype=torch.float32):
    made = UNet(CONFIG, dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            scale = 0.2 if parameter.ndim > 1 else 0.5
            parameter.copy_(rand(*parameter.shape, seed=1000 * seed + i) * scale)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def unet():
    return random_unet(0)


@pytest.fixture(scope="module")
def network(unet):
    return TrainingFree.from_unet(unet, "paperdoll", layers="all", levels=2)


def encode(unet, network, latents, context, masks=None, weights=None):
    features = record(unet, SCHEDULE, network, latents, context)
    features = {site: features[site] for site in network.maker.sites}
    return split_features(features, latents.shape[2:], masks or [None] * len(latents), weights)


def encoded(unet, network, count=2, **kw):
    latents, context = rand(count, 4, 8, 8, seed=3), rand(count, 3, 16, seed=4)
    return encode(unet, network, latents, context, **kw)


def bank_of(network, references):
    return make_bank(join_references(references), None, network.site_downsampling())


def retrieval(unet, network, references, strength=1.0, **kw):
    bank, timesteps = bank_of(network, references), network.timesteps()
    return JointRetrieval(bank, strength, names=name_layers(unet), timesteps=timesteps, **kw)


def run(unet, *applications, rows=1, kinds=(0,), progress=0.5):
    """The U-Net's prediction for noise, whose chunks are conditional (0) or not (1)."""
    x, context = rand(rows, 4, 8, 8, seed=7), rand(rows, 3, 16, seed=8)
    hooks = Applications(applications).hooks(kinds, progress)
    return unet(x, torch.full((rows,), 500), context, **hooks)


# The layers.


@pytest.mark.parametrize(("config", "count"), [(CONFIG, 8), (SD15, 16), (SDXL, 70)])
def test_the_layers_are_the_modules_self_attention(config, count):
    with torch.device("meta"):
        modules = {name: module for module, name in name_layers(UNet(config)).items()}
    layers = list_self_attention_layers(config)
    assert list(modules) == list(layers) and len(layers) == count
    for name, layer in layers.items():
        assert modules[name].to_k.weight.shape == (layer.width, layer.width)


def test_each_layer_has_the_downsampling_that_it_is_told(unet):
    seen, names = {}, name_layers(unet)

    def hook(layer, size, q, k, v, heads):
        seen[names[layer]] = size
        return layer.attend(q, k, v, heads)

    unet(rand(1, 4, 8, 8), torch.tensor([500]), rand(1, 3, 16), self_attention=hook)
    factors = {
        name: layer.downsampling for name, layer in list_self_attention_layers(CONFIG).items()
    }
    assert seen == {name: (8 // factor, 8 // factor) for name, factor in factors.items()}


def test_choices_of_layers():
    assert choose_layers(SD15, NO_LAYERS) == ()
    for choice in LAYER_CHOICES:
        assert set(choose_layers(SD15, choice)) <= set(list_self_attention_layers(SD15))
    assert choose_layers(SD15, "all") == tuple(list_self_attention_layers(SD15))
    assert len(choose_layers(SD15, "decoder")) == 9
    assert choose_layers(SD15, "middle and decoder")[0] == "middle.0"
    for config, finest in ((SD15, 5), (SDXL, 10)):
        coarse, fine = choose_layers(config, "all but the finest"), choose_layers(config, "finest")
        assert set(coarse) | set(fine) == set(choose_layers(config, "all"))
        assert not set(coarse) & set(fine) and len(fine) == finest
    assert choose_layers(CONFIG, "output_3, middle.1") == ("middle.1", "output_3.0")


def test_bad_choices_are_refused_in_one_sentence(unet):
    shallow = UNetConfig(32, (1, 2), (1, 1), (0, 0), 1, 16, num_head_channels=16)
    assert "'nonsense'" in sentence(choose_layers, CONFIG, "nonsense")
    assert "'input_9'" in sentence(choose_layers, CONFIG, "middle, input_9")
    assert "'decoder' matches none" in sentence(choose_layers, shallow, "decoder")
    assert "0 noise levels" in sentence(TrainingFree, CONFIG, "paperdoll", "", "all", 0)
    assert "strength -1" in sentence(JointRetrieval, Bank(), -1.0)


# The arithmetic.


def plain_joint(q, k, v, heads, sources):
    """own + sum_i r_i (joint_i - own) of one row and position at a time; weights multiply exp.

    Regions that together exceed 1 at a position are scaled down to a sum of 1.
    """
    rows, positions, width = q.shape
    dim = width // heads
    out = torch.zeros(rows, positions, width, dtype=torch.float64)

    def attended(row, position, head, tokens):
        part = slice(head * dim, (head + 1) * dim)
        total, result = 0.0, torch.zeros(dim, dtype=torch.float64)
        for key, value, weight in tokens:
            share = weight * math.exp(float(q[row, position, part] @ key[part]) / math.sqrt(dim))
            total, result = total + share, result + share * value[part]
        return result / total

    for row in range(rows):
        own = [(k[row, i], v[row, i], 1.0) for i in range(k.shape[1])]
        for position in range(positions):
            shares = [1.0 if r is None else float(r[position]) for *_, r in sources]
            for head in range(heads):
                base = attended(row, position, head, own)
                result = base.clone()
                for (keys, values, weights, _), share in zip(sources, shares, strict=True):
                    group = row * len(keys) // rows
                    more = list(zip(keys[group], values[group], weights[group], strict=True))
                    joint = attended(row, position, head, own + more)
                    result += share / max(1.0, sum(shares)) * (joint - base)
                out[row, position, head * dim : (head + 1) * dim] = result
    return out


def double(*shape, seed):
    return rand(*shape, seed=seed, dtype=torch.float64)


def plain_adain(own, banks, weights):
    """One channel of one row at a time."""
    out = torch.zeros_like(own)
    for row in range(len(own)):
        group = row * len(banks) // len(own)
        shares = weights[group] / weights[group].sum()
        for channel in range(own.shape[2]):
            mine, theirs = own[row, :, channel], banks[group, :, channel]
            mean = float((shares * theirs).sum())
            deviation = math.sqrt(float((shares * (theirs - mean) ** 2).sum()))
            centred = mine - mine.mean()
            out[row, :, channel] = centred / centred.square().mean().sqrt() * deviation + mean
    return out


@pytest.mark.parametrize("banks", [1, 2])
def test_statistics_matching_against_plain_float64(banks):
    q, k, v = (double(2, 6, 8, seed=i) for i in range(3))
    keys, values = double(banks, 5, 8, seed=10), 3 + double(banks, 5, 8, seed=20)
    weights = double(banks, 5, seed=30).exp()
    source = Source(keys, values, weights.log(), None, True)
    found = attend_to(attention, q, k, v, 2, [source])
    own = plain_adain(v, values, weights)
    expected = plain_joint(q, k, own, 2, [(keys, values, weights, None)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (
        found - attend_to(attention, q, k, v, 2, [replace(source, adain=False)])
    ).abs().max() > 1


@pytest.mark.parametrize(
    "case",
    ["one", "weights", "soft region", "two overlapping", "three everywhere", "a batch of banks"],
)
def test_joint_attention_against_plain_float64(case):
    q, k, v = (double(2, 6, 8, seed=i) for i in range(3))
    banks = 2 if case == "a batch of banks" else 1
    plain, sources = [], []
    for i in range({"two overlapping": 2, "three everywhere": 3}.get(case, 1)):
        keys, values = double(banks, 5, 8, seed=10 + i), double(banks, 5, 8, seed=20 + i)
        weights = torch.ones(banks, 5, dtype=torch.float64)
        if case != "one":
            weights = double(banks, 5, seed=30 + i).exp()
        region = None
        if "region" in case or "overlap" in case:
            region = torch.tensor([0, 1, 0.3, 1, 0.7, 0], dtype=torch.float64).roll(i)
        plain.append((keys, values, weights, region))
        bias = None if case == "one" else weights.log()
        sources.append(Source(keys, values, bias, region))
    found = attend_to(attention, q, k, v, 2, sources)
    torch.testing.assert_close(found, plain_joint(q, k, v, 2, plain), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("region", [None, torch.tensor([0, 1, 0.4, 1, 0.7, 0.5])])
def test_three_equal_banks_count_as_one_of_the_same_weight(region):
    q, k, v = (double(2, 6, 8, seed=i) for i in range(3))
    one = Source(*(double(1, 5, 8, seed=i) for i in (10, 11)), double(1, 5, seed=12), region)
    whole = None if region is None else (3 * region).clamp_max(1)
    expected = attend_to(attention, q, k, v, 2, [replace(one, region=whole)])
    torch.testing.assert_close(attend_to(attention, q, k, v, 2, [one] * 3), expected)


def test_rows_without_sources_and_positions_outside_are_untouched():
    q, k, v = (rand(4, 6, 8, seed=i) for i in range(3))
    own = attention(q, k, v, 2)
    region = torch.tensor([0, 0, 0, 1, 1, 0.5])
    source = Source(rand(1, 5, 8, seed=10), rand(1, 5, 8, seed=11), None, region)
    found = attend_chunks(attention, q, k, v, 2, [[], [source]])
    torch.testing.assert_close(found[:2], own[:2])
    torch.testing.assert_close(found[2:, :3], own[2:, :3])
    assert ((found[2:, 3:] - own[2:, 3:]).abs().amax(-1) > 1e-3).all()
    assert torch.equal(attend_chunks(attention, q, k, v, 2, [[], []]), own)
    swapped = attend_chunks(attention, q.flip(0), k.flip(0), v.flip(0), 2, [[source], []])
    torch.testing.assert_close(swapped.flip(0), found)
    # A bank of great worth inside the region would show outside if a single weight leaked.
    loud = replace(source, values=source.values + 1e6)
    torch.testing.assert_close(attend_to(attention, q, k, v, 2, [loud])[:, :3], own[:, :3])


class PlainJointUNet(PlainUNet):
    """Notes what each self-attention sees, or attends to what was noted; in float64."""

    # Of each application: its region, and name -> list of (tokens [M, C] projected here, weight).
    banks: list | None = None

    def attention(self, x, context, name):
        if not name.endswith(".attn1"):
            return super().attention(x, context, name)
        if self.banks is None:
            self.noted[name] = x
            return super().attention(x, context, name)
        edge = math.isqrt(x.shape[1])
        regions = [
            resize_region(r, x.new_empty(1, 1, edge, edge)).view(-1, 1) for r, _ in self.banks
        ]
        total = sum(regions).clamp_min(1)
        own = out = self.attend(x, [], name)
        for region, (_, bank) in zip(regions, self.banks, strict=True):
            out = out + region / total * (self.attend(x, bank[name], name) - own)
        return self.linear(out, name + ".to_out.0")

    def attend(self, x, bank, name):
        """x [1, N, C] to itself and to tokens that count as often as they weigh."""
        tokens = [(x[0], 1.0), *bank]
        both = torch.cat([t for t, _ in tokens])[None]
        weights = torch.cat([torch.full((len(t),), w) for t, w in tokens]).double()
        q = self.linear(x, name + ".to_q")
        k, v = self.linear(both, name + ".to_k"), self.linear(both, name + ".to_v")
        heads = self.heads(x.shape[-1])
        dim, outputs = x.shape[-1] // heads, []
        for head in range(heads):
            part = slice(head * dim, (head + 1) * dim)
            shares = torch.exp(q[..., part] @ k[..., part].mT / math.sqrt(dim)) * weights
            outputs.append(shares / shares.sum(2, keepdim=True) @ v[..., part])
        return torch.cat(outputs, 2)


def half(left, width=8):
    region = torch.zeros(8, 8)
    region[:, slice(0, width) if left else slice(8 - width, 8)] = 1
    return region


@pytest.mark.parametrize(
    "regions", [[None], [half(True, 4), half(False, 4)], [half(True, 6), half(False, 5)]]
)
def test_the_whole_mode_against_a_plain_float64_unet(regions):
    """References noised, read, masked, weighted, attended to in their regions: by the formulas."""
    unet = random_unet(0, torch.float64)
    network = TrainingFree.from_unet(unet, "paperdoll", layers="all", levels=2)
    mask = torch.zeros(8, 8)
    mask[2:5, 1:7] = 1
    masks, weights, strengths, level = [None, mask], (1.0, 0.4), (2.5, 0.7), 750
    plain = PlainJointUNet(unet.state_dict(), CONFIG.heads)
    abar = float(SCHEDULE.alphas_cumprod()[level])
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    applications, banks = [], []
    for a, (region, strength) in enumerate(zip(regions, strengths)):
        latents, context = double(2, 4, 8, 8, seed=30 + a), double(2, 3, 16, seed=40 + a)
        references = encode(unet, network, latents, context, masks, weights)
        applications.append(retrieval(unet, network, references, strength, region=region))
        bank: dict = {}
        for i, weight in enumerate(weights):
            plain.noted = {}
            noised = math.sqrt(abar) * latents[i] + math.sqrt(1 - abar) * noise
            plain(noised[None], torch.tensor([level]), context[i : i + 1])
            for name, tokens in plain.noted.items():
                edge = math.isqrt(tokens.shape[1])
                step = 8 // edge
                kept = [
                    y * edge + x
                    for y in range(edge)
                    for x in range(edge)
                    if i == 0 or mask[y * step : (y + 1) * step, x * step : (x + 1) * step].any()
                ]
                bank.setdefault(name, []).append((tokens[0, kept], weight * strength))
        banks.append((torch.ones(8, 8) if region is None else region, bank))
    hooks = Applications(applications).hooks([0], 1 - 700 / 999)
    x, text = double(1, 4, 8, 8, seed=7), double(1, 3, 16, seed=8)
    found = unet(x, torch.tensor([700]), text, **hooks)
    plain.banks = banks
    # The timestep's embedding is float32 by design, and all that separates the two.
    torch.testing.assert_close(found, plain(x, torch.tensor([700]), text), rtol=1e-4, atol=1e-5)
    assert (found - unet(x, torch.tensor([700]), text)).abs().max() > 1e-3


# What must hold.


def test_strength_zero_empty_bank_and_outside_the_schedule_are_bit_for_bit_the_base(unet, network):
    base = run(unet)
    references = encoded(unet, network)
    off = {
        "strength 0": retrieval(unet, network, references, 0.0),
        "empty bank": retrieval(unet, network, []),
        "outside the schedule": retrieval(unet, network, references, start=0.6),
        "curve at 0": retrieval(unet, network, references, curve=StrengthCurve((0.0,))),
        "all layers at 0": retrieval(
            unet, network, references, site_strength=dict.fromkeys(ALL, 0.0)
        ),
    }
    for name, one in off.items():
        assert torch.equal(run(unet, one), base), name
    assert not torch.equal(run(unet, retrieval(unet, network, references)), base)


def test_a_weight_counts_as_often_as_copies_and_zero_as_none(unet, network):
    one, other = encoded(unet, network)

    def made(*references, **kw):
        return run(unet, retrieval(unet, network, references, **kw))

    copies = made(one, one, one, other)
    torch.testing.assert_close(made(one.with_weight(3.0), other), copies, rtol=1e-4, atol=1e-5)
    assert torch.equal(made(one.with_weight(0.0), other), made(other))
    torch.testing.assert_close(made(one, strength=3.0), made(one, one, one), rtol=1e-4, atol=1e-5)
    assert (made(one, other) - copies).abs().max() > 1e-3


def test_masked_tokens_are_not_in_the_bank_whatever_they_held(unet, network):
    mask = torch.zeros(64, 64)
    mask[:16] = 1
    whole, part = encoded(unet, network, masks=[None, mask])
    layers = list_self_attention_layers(CONFIG)
    for level in network.timesteps():
        for name, layer in layers.items():
            site = name_site(name, level)
            edge = 8 // network.site_downsampling()[site]
            assert whole.tokens[site].shape == (2, edge * edge, layer.width)
            assert part.tokens[site].shape == (2, edge * edge // 4, layer.width)
        site = name_site(MATCHED, level)
        assert torch.equal(part.tokens[site][0], encoded(unet, network)[1].tokens[site][0])
        assert part.tokens[site][1, 4:].eq(0).all() and part.tokens[site][1, :4, 16].eq(1).all()


def test_an_empty_mask_and_all_weights_zero_are_refused(unet, network):
    message = sentence(encoded, unet, network, masks=[None, torch.zeros(8, 8)])
    assert "mask of reference 2" in message
    references = [r.with_weight(0.0) for r in encoded(unet, network)]
    assert "All 2 references have weight 0" in sentence(bank_of, network, references)


def test_only_the_chosen_layers_and_the_nearest_level_are_read(unet):
    network = TrainingFree.from_unet(unet, "paperdoll", layers="decoder", levels=3)
    assert network.timesteps() == (166, 500, 833)
    assert [find_nearest(network.timesteps(), t) for t in (0, 332, 333, 334, 999)] == [
        166, 166, 166, 500, 833,
    ]  # fmt: skip
    references = encoded(unet, network, 1)
    assert set(references[0].tokens) == set(network.site_channels())
    assert {site.split("_")[0].split("@")[0] for site in references[0].tokens} == {
        "output",
        MATCHED,
    }
    for progress, level in ((0.0, 833), (0.5, 500), (1.0, 166)):
        here = {site for site in references[0].tokens if site.endswith(f"@{level}")}
        only = replace(
            references[0],
            tokens={
                s: t if s in here else t * float("nan") for s, t in references[0].tokens.items()
            },
        )
        assert run(unet, retrieval(unet, network, [only]), progress=progress).isfinite().all()


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [1], [0], [0, 1, 0]])
def test_only_conditional_rows_retrieve(unet, network, order):
    references = encoded(unet, network)
    rows = 2 * len(order)
    base, cond, both = (
        run(unet, *applications, rows=rows, kinds=order)
        for applications in (
            [],
            [retrieval(unet, network, references)],
            [retrieval(unet, network, references, guidance="both")],
        )
    )
    for i, chunk in enumerate(order):
        part = slice(2 * i, 2 * i + 2)
        expected = base if chunk == 1 else both
        torch.testing.assert_close(cond[part], expected[part], rtol=1e-4, atol=1e-5)
        assert (both[part] - base[part]).abs().max() > 1e-3


def test_a_region_everywhere_is_none_and_nowhere_is_the_base(unet, network):
    references = encoded(unet, network)

    def made(region):
        return run(unet, retrieval(unet, network, references, region=region))

    none = made(None)
    assert torch.equal(made(torch.ones(64, 64)), none)
    torch.testing.assert_close(made(torch.zeros(64, 64)), run(unet), rtol=1e-4, atol=1e-5)
    right = half(False, 4)
    assert not torch.equal(made(right), none) and not torch.equal(made(right), run(unet))


def test_three_equal_applications_are_one(unet, network):
    one = retrieval(unet, network, encoded(unet, network), 2.0)
    torch.testing.assert_close(run(unet, *[one] * 3), run(unet, one), rtol=1e-4, atol=1e-5)


def test_a_batch_of_banks_equals_banks_one_by_one(unet, network):
    latents, context = rand(4, 4, 8, 8, seed=3), rand(4, 3, 16, seed=4)
    recorded = record(unet, SCHEDULE, network, latents, context)
    tokens = {site: recorded[site][0].unflatten(0, (2, 2)) for site in network.maker.sites}
    bank = make_bank(batch_tokens(tokens), None, network.site_downsampling())
    both = JointRetrieval(bank, names=name_layers(unet), timesteps=network.timesteps())
    found = run(unet, both, rows=4, kinds=[0, 1])
    references = encode(unet, network, latents, context)
    for i in range(2):
        one = retrieval(unet, network, references[2 * i : 2 * i + 2])
        expected = run(unet, one, rows=4, kinds=[0, 1])
        torch.testing.assert_close(found[i], expected[i], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2:], run(unet, rows=4)[2:], rtol=1e-4, atol=1e-5)


def test_encoding_is_deterministic_and_equal_references_give_equal_tokens(unet, network):
    first, again = encoded(unet, network), encoded(unet, network)
    assert all(torch.equal(first[1].tokens[s], again[1].tokens[s]) for s in first[1].tokens)
    latents, context = rand(1, 4, 8, 8).expand(2, -1, -1, -1), rand(1, 3, 16).expand(2, -1, -1)
    one, same = encode(unet, network, latents, context)
    for site in one.tokens:
        torch.testing.assert_close(one.tokens[site], same.tokens[site], rtol=1e-5, atol=1e-6)
    assert torch.equal(make_fixed_noise((2, 4, 8, 8))[0], make_fixed_noise((1, 4, 8, 8))[0])


def generated(unet, *applications, steps=4):
    cond, uncond = rand(2, 3, 16, seed=8), rand(2, 3, 16, seed=9)
    denoise = make_guided_denoiser(unet, SCHEDULE, cond, uncond, 2.0, applications)
    return sample(denoise, rand(2, 4, 8, 8, seed=7), SCHEDULE, steps)


def test_sampling_makes_no_pass_more_and_differs_from_the_base(unet, network):
    references = encoded(unet, network)
    calls = []
    handle = unet.out.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        base = generated(unet)
        passes = len(calls)
        found = generated(unet, retrieval(unet, network, references))
    finally:
        handle.remove()
    assert passes == 4 and len(calls) == 8
    assert (found - base).abs().max() > 1e-3
    assert torch.equal(generated(unet, retrieval(unet, network, references, 0.0)), base)


def test_saved_then_loaded_samples_bit_for_bit(unet, network, tmp_path):
    mask = torch.zeros(8, 8)
    mask[2:5] = 1
    references = encoded(unet, network, masks=[None, mask], weights=[1.0, 0.4])
    save_references(tmp_path / "her.safetensors", references, network.maker)
    loaded = load_references(tmp_path / "her.safetensors", network.maker)
    assert [r.weight for r in loaded] == [1.0, 0.4]
    pictures = [generated(unet, retrieval(unet, network, r)) for r in (references, loaded)]
    assert torch.equal(*pictures)


@pytest.mark.parametrize(
    ("part", "value"), [("values", torch.zeros(2, 32)), ("keys", torch.zeros(64, 32).int())]
)
def test_keys_and_values_that_do_not_fit_together_are_refused(unet, network, tmp_path, part, value):
    path, key = tmp_path / "r.safetensors", f"1.{part}.input_1.0@250"
    save_references(path, encoded(unet, network), network.maker)
    tensors, metadata = read_safetensors(path)
    assert tensors[key].shape == (64, 32)
    save_safetensors(path, {k: v.clone() for k, v in tensors.items()} | {key: value}, metadata)
    assert "input_1.0@250" in sentence(load_references, path, network.maker)


def test_files_of_the_first_version_are_read(unet, network, tmp_path):
    path, references = tmp_path / "r.safetensors", encoded(unet, network)
    save_references(path, references, network.maker)
    tensors, metadata = read_safetensors(path)
    tensors = {k: v.clone() for k, v in tensors.items()}
    save_safetensors(path, tensors, metadata | {"format_version": "1"})
    for read, saved in zip(load_references(path, network.maker), references, strict=True):
        assert all(torch.equal(read.tokens[site], saved.tokens[site]) for site in saved.tokens)


def test_references_of_another_base_choice_or_network_are_refused(unet, network, tmp_path):
    path = tmp_path / "her.safetensors"
    save_references(path, encoded(unet, network), network.maker)
    trained = RetrievalControlNet(CONFIG, Card("paperdoll"))
    others = (
        TrainingFree.from_unet(random_unet(1), "paperdoll", layers="all", levels=2).maker,
        TrainingFree.from_unet(unet, "paperdoll", layers="all", levels=3).maker,
        TrainingFree.from_unet(unet, "paperdoll", layers="none", levels=2).maker,
        TrainingFree.from_unet(unet, "paperdoll", layers="decoder", levels=2).maker,
        describe_maker(trained),
    )
    for other in others:
        assert "encoded by another network" in sentence(load_references, path, other)
    assert load_references(path, network.maker)


def test_the_groups_of_layers_are_those_of_the_sites():
    groups = TrainingFree(SD15, "sd15", "", "all").groups()
    assert groups["means"] == "composition" and groups["rest"] == "detail"
    assert groups["input_1.0"] == groups["output_11.0"] == "detail"
    assert groups["middle.0"] == "composition"
    assert groups["input_7.0"] == groups["output_3.0"] == "middle"
