"""The latent pull against float64 arithmetic, and what must hold of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from batched_tokens import batch_tokens

from retrieval_core.bank.bank_file import load_references, save_references
from retrieval_core.bank.encoding import split_features
from retrieval_core.bank.site_bank import SiteBank, make_bank
from retrieval_core.bank.tokens import join_references
from retrieval_core.network.unet import SD15, SDXL, UNet, UNetConfig
from retrieval_core.sampling.controls import GROUP_PRESETS, Controls, StrengthCurve
from retrieval_core.sampling.noise_schedule import NoiseSchedule
from retrieval_core.sampling.presets import MEANS_END, PRESETS, Preset
from retrieval_core.sampling.sampler import make_guided_denoiser, sample
from retrieval_core.training_free import JointRetrieval, TrainingFree, name_layers, record
from retrieval_core.training_free.latent_pull import (
    SHARPNESS,
    choose_match_layer,
    find_shift,
    make_match_tokens,
    split_patches,
    take,
)

CONFIG = UNetConfig(32, (1, 2), (1, 1), (1, 1), 2, 16, num_head_channels=16)
SCHEDULE = NoiseSchedule()
FULL = Preset(strength=1.0, end=1.0, detail_end=0.5)
MEANS = replace(FULL, detail_end=0.0)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def unet():
    made = UNet(CONFIG, dtype=torch.float64)
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.copy_(rand(*parameter.shape, seed=i) * (0.2 if parameter.ndim > 1 else 0.5))
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network(unet):
    return TrainingFree.from_unet(unet, "paperdoll", layers="none", levels=2)


def encode(unet, network, latents, masks=None, weights=None):
    context = rand(len(latents), 3, 16, seed=4)
    features = record(unet, SCHEDULE, network, latents, context)
    features = {site: features[site] for site in network.maker.sites}
    return split_features(features, latents.shape[2:], masks or [None] * len(latents), weights)


def apply(unet, network, references, strength=1.0, preset=FULL, **kw):
    bank = make_bank(join_references(references), None, network.site_downsampling())
    return JointRetrieval(
        bank,
        strength,
        names=name_layers(unet),
        match_layer=network.match_layer,
        preset=preset,
        timesteps=network.timesteps(),
        **kw,
    )


def predict(unet, *applications, timestep=700, cfg=2.0, size=(8, 8)):
    """A step's prediction of x0 for two pictures."""
    cond, uncond = rand(2, 3, 16, seed=8), rand(2, 3, 16, seed=9)
    denoise = make_guided_denoiser(unet, SCHEDULE, cond, uncond, cfg, applications)
    return denoise(rand(2, 4, *size, seed=7), timestep)


def draw(unet, *applications):
    cond, uncond = rand(2, 3, 16, seed=8), rand(2, 3, 16, seed=9)
    denoise = make_guided_denoiser(unet, SCHEDULE, cond, uncond, 2.0, applications)
    return sample(denoise, rand(2, 4, 8, 8, seed=7), SCHEDULE, 3)


def test_the_matched_layer_is_the_decoders_first_at_half_the_resolution():
    layers = [choose_match_layer(config) for config in (SD15, SDXL, CONFIG)]
    assert layers == ["output_6.0", "output_3.0", "output_0.0"]
    shallow = UNetConfig(32, (1, 2), (1, 1), (0, 0), 1, 16, num_head_channels=16)
    assert choose_match_layer(shallow) == "middle.0"


# The arithmetic.


def test_the_match_against_plain_float64():
    """One token of the picture and one of the bank at a time."""
    keys, theirs, values = rand(2, 6, 8), rand(1, 5, 8, seed=1), rand(1, 5, 3, seed=2)
    weights = rand(1, 5, seed=3).exp()
    found = take(keys, SiteBank(theirs, values, weights.log(), torch.zeros(5, dtype=torch.long)))
    mean = (weights[0, :, None] * theirs[0]).sum(0) / weights.sum()
    for row in range(2):
        for n in range(6):
            own, total, expected = keys[row, n] - keys[row].mean(0), 0.0, torch.zeros(3).double()
            for m in range(5):
                other = theirs[0, m] - mean
                cosine = float(own @ other / own.norm() / other.norm())
                share = float(weights[0, m]) * math.exp(SHARPNESS * cosine)
                total, expected = total + share, expected + share * values[0, m]
            torch.testing.assert_close(found[row, n], expected / total)


@pytest.mark.parametrize("text", [True, False])
def test_the_shift_against_plain_float64(text):
    """Of latents of 4 x 6 pixels and tokens of 2 x 2, one token at a time."""
    x0, taken = rand(1, 3, 4, 6), rand(1, 13, 2, 3, seed=1)
    direction = rand(1, 3, 4, 6, seed=2) if text else None
    found = find_shift(x0, taken, direction, 0.7, 0.4)
    dropped = 0
    for i in range(2):
        for j in range(3):
            here = (0, slice(None), slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
            u = taken[0, :12, i, j].view(3, 2, 2) - taken[0, 12, i, j] * x0[here]
            mean = u.mean((1, 2), keepdim=True)
            s = 0.7 * mean + 0.4 * (u - mean)
            if text:
                t = direction[here]
                along = float((s * t).sum())
                dropped += along < 0
                s = s - min(along, 0.0) / float((t * t).sum()) * t
            torch.testing.assert_close(found[here], s)
    assert not text or 0 < dropped < 6


def test_pixels_of_tokens_where_the_size_does_not_divide():
    latents = rand(1, 2, 5, 7)
    patches = split_patches(latents, (3, 4))
    assert patches.shape == (1, 12, 2, 4)
    assert torch.equal(patches[0, 5].view(2, 2, 2), latents[0, :, 2:4, 2:4])
    corner = latents[0, :, 4, 6, None].expand(2, 4)
    assert torch.equal(patches[0, 11], corner)
    assert find_shift(latents, rand(1, 9, 3, 4), None, 1.0, 1.0).shape == latents.shape


@pytest.mark.parametrize("width", [4, 40])
def test_tokens_hold_keys_and_latents_padded_to_one_width(width):
    keys, latents = rand(1, 4, width), rand(1, 2, 4, 4, seed=1)
    tokens = make_match_tokens(keys, latents, (2, 2))
    assert tokens.shape == (1, 2, 4, max(width, 9))
    assert torch.equal(tokens[:, 0, :, :width], keys) and tokens[:, 1, :, 8].eq(1).all()
    assert torch.equal(tokens[0, 1, 3, :8].view(2, 2, 2), latents[0, :, 2:, 2:])
    assert not tokens[:, 0, :, width:].any() and not tokens[:, 1, :, 9:].any()


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_step_against_its_formula(unet, network, cfg):
    """Two references, one masked, in two overlapping regions; all by plain operations."""
    mask = torch.zeros(8, 8)
    mask[2:6, 1:5] = 1
    references = encode(unet, network, rand(2, 4, 8, 8, seed=3), [None, mask], [1.0, 0.5])
    left, right = torch.zeros(8, 8), torch.zeros(8, 8)
    left[:, :6], right[:, 4:] = 1, 1
    applications = [
        apply(unet, network, references, 0.8, region=left),
        apply(unet, network, references[::-1], 0.2, region=right),
    ]
    found = predict(unet, *applications, cfg=cfg)
    x0 = predict(unet, cfg=cfg)
    text = None if cfg == 1 else predict(unet, cfg=1.0) - predict_negative(unet)
    keys = read_keys(unet, network)
    bank = make_bank(join_references(references), None, network.site_downsampling())
    taken = take(keys, bank.sites["match@750"]).mT.unflatten(2, (4, 4))
    shift = find_shift(x0, taken, text, 1.0, 1.0)
    share = torch.tensor([0.8] * 4 + [0.5] * 2 + [0.2] * 2, dtype=torch.float64)
    torch.testing.assert_close(found, x0 + share * shift, rtol=1e-6, atol=1e-6)


def predict_negative(unet):
    """x0 of the negative prompt."""
    uncond = rand(2, 3, 16, seed=9)
    return make_guided_denoiser(unet, SCHEDULE, uncond, uncond, 1.0)(rand(2, 4, 8, 8, seed=7), 700)


def read_keys(unet, network):
    """Keys of the matched layer in the step of `predict`, with the prompt."""
    names, noted = name_layers(unet), {}

    def hook(layer, size, q, k, v, heads):
        noted[names[layer]] = k
        return layer.attend(q, k, v, heads)

    x = rand(2, 4, 8, 8, seed=7) / (1 + float(SCHEDULE.sigmas()[700]) ** 2) ** 0.5
    unet(x, torch.full((2,), 700), rand(2, 3, 16, seed=8), self_attention=hook)
    return noted[network.match_layer]


# What must hold.


def test_strength_zero_and_outside_the_schedule_are_bit_for_bit_the_base(unet, network):
    references = encode(unet, network, rand(2, 4, 8, 8, seed=3))
    base = predict(unet)
    off = {
        "strength 0": apply(unet, network, references, 0.0),
        "no reference": apply(unet, network, []),
        "before the start": apply(unet, network, references, start=0.6),
        "curve at 0": apply(unet, network, references, curve=StrengthCurve((0.0,))),
        "parts at 0": apply(unet, network, references, site_strength={"means": 0.0, "rest": 0.0}),
    }
    for name, one in off.items():
        assert torch.equal(predict(unet, one), base), name
    assert (predict(unet, apply(unet, network, references)) - base).abs().max() > 1e-3
    late = {"timestep": round((1 - MEANS_END) * 999) - 1}
    assert torch.equal(
        predict(unet, apply(unet, network, references), **late), predict(unet, **late)
    )
    assert torch.equal(draw(unet, apply(unet, network, references, 0.0)), draw(unet))


def test_what_is_outside_a_mask_is_not_taken(unet, network):
    """A reference whose latent differs outside the mask alone gives the same, for the same keys."""
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    (one,) = encode(unet, network, rand(1, 4, 8, 8, seed=3), [mask])
    loud = {site: tokens.clone() for site, tokens in one.tokens.items()}
    for tokens in loud.values():
        assert not tokens[1, 8:].any()
        tokens[1, :8, :16] += 1e3
    base = predict(unet)
    moved = predict(unet, apply(unet, network, [replace(one, tokens=loud)])) - base
    assert moved.abs().max() > 100
    # Places like the surroundings take little: the gate is the part of the match inside the mask.
    quiet = (predict(unet, apply(unet, network, [one])) - base).abs().mean()
    (whole,) = encode(unet, network, rand(1, 4, 8, 8, seed=3))
    assert quiet < (predict(unet, apply(unet, network, [whole])) - base).abs().mean()


def test_a_weight_counts_as_often_as_copies_and_zero_as_none(unet, network):
    one, other = encode(unet, network, rand(2, 4, 8, 8, seed=3))

    def made(*references):
        return predict(unet, apply(unet, network, references))

    torch.testing.assert_close(made(one.with_weight(3.0), other), made(one, one, one, other))
    assert torch.equal(made(one.with_weight(0.0), other), made(other))
    assert (made(one, other) - made(one, one, one, other)).abs().max() > 1e-4


def test_equal_tokens_merge_without_loss(unet, network):
    """A budget of one reference's tokens, for two equal references."""
    references = encode(unet, network, rand(1, 4, 8, 8, seed=3)) * 2
    whole = apply(unet, network, references)
    tokens = join_references(references)
    merged = replace(whole, bank=make_bank(tokens, None, network.site_downsampling(), 16))
    assert merged.bank.sites["match@250"].keys.shape[1] == 16
    torch.testing.assert_close(predict(unet, merged), predict(unet, whole), rtol=1e-4, atol=1e-4)


def test_equal_applications_are_one_and_a_strength_up_to_1_scales_the_shift(unet, network):
    references, base = encode(unet, network, rand(2, 4, 8, 8, seed=3)), predict(unet)
    one = predict(unet, apply(unet, network, references))
    three = [apply(unet, network, references) for _ in range(3)]
    torch.testing.assert_close(predict(unet, *three), one)
    half = predict(unet, apply(unet, network, references, 0.5))
    torch.testing.assert_close(half - base, 0.5 * (one - base))
    assert torch.equal(predict(unet, apply(unet, network, references, 4.0)), one)


def test_nothing_moves_outside_a_region(unet, network):
    region = torch.zeros(8, 8)
    region[:, :3] = 1
    references, base = encode(unet, network, rand(2, 4, 8, 8, seed=3)), predict(unet)
    found = predict(unet, apply(unet, network, references, region=region))
    assert torch.equal(found[..., 3:], base[..., 3:])
    everywhere = predict(unet, apply(unet, network, references))
    torch.testing.assert_close(found[..., :3], everywhere[..., :3])


def test_a_batch_of_banks_equals_banks_one_by_one(unet, network):
    latents = rand(4, 4, 8, 8, seed=3)
    recorded = record(unet, SCHEDULE, network, latents, rand(4, 3, 16, seed=4))
    tokens = {site: recorded[site][0].unflatten(0, (2, 2)) for site in network.maker.sites}
    bank = make_bank(batch_tokens(tokens), None, network.site_downsampling())
    references = encode(unet, network, latents)
    both = predict(unet, replace(apply(unet, network, references), bank=bank))
    for i in range(2):
        one = predict(unet, apply(unet, network, references[2 * i : 2 * i + 2]))
        torch.testing.assert_close(both[i], one[i])


def test_pictures_of_other_sizes_than_the_references(unet, network):
    references = encode(unet, network, rand(2, 4, 8, 8, seed=3))
    for size in ((8, 12), (16, 6)):
        found = predict(unet, apply(unet, network, references), size=size)
        assert found.shape[2:] == size and found.isfinite().all()
        assert (found - predict(unet, size=size)).abs().max() > 1e-3


def test_saved_then_loaded_samples_bit_for_bit(unet, network, tmp_path):
    mask = torch.zeros(8, 8)
    mask[2:5] = 1
    references = encode(unet, network, rand(2, 4, 8, 8, seed=3), [None, mask], [1.0, 0.4])
    save_references(tmp_path / "her.safetensors", references, network.maker)
    loaded = load_references(tmp_path / "her.safetensors", network.maker)
    assert torch.equal(*(draw(unet, apply(unet, network, r)) for r in (references, loaded)))


def test_groups_of_sites_choose_means_and_detail(unet, network):
    base = predict(unet, cfg=1.0)  # without a negative prompt nothing yields to the text
    references = encode(unet, network, rand(1, 4, 8, 8, seed=3))

    def moved(groups):
        strengths = Controls(groups=GROUP_PRESETS[groups]).site_strengths(network.groups())
        one = apply(unet, network, references, site_strength=strengths)
        return split_patches(predict(unet, one, cfg=1.0) - base, (4, 4))

    means, detail = moved("composition only"), moved("detail only")
    torch.testing.assert_close(means, means.mean(-1, keepdim=True).expand_as(means))
    assert detail.mean(-1).abs().max() < 1e-9 and detail.abs().max() > 1e-4
    torch.testing.assert_close(moved("all"), means + detail)
    step = predict(unet, apply(unet, network, references, preset=MEANS), cfg=1.0) - base
    torch.testing.assert_close(split_patches(step, (4, 4)), means)


def test_presets_begin_with_the_prompt_and_end_with_the_character():
    assert list(PRESETS) == ["prompt first", "balanced", "character first"]
    ends = [preset.detail_end for preset in PRESETS.values()]
    assert ends == sorted(ends) and ends[-1] <= MEANS_END
    for preset in PRESETS.values():
        assert preset.pull_at(preset.detail_end - 1e-6)[1] == 1.0
        strength, end = preset.limit(0.8, 0.2, 0.9)
        assert strength == 0.8 * preset.strength and end == min(0.9, preset.end)
        assert preset.limit(0.8, 0.95, 1.0)[1] == max(0.95, preset.end)
        assert preset.pull_at(preset.detail_end) == (float(preset.detail_end < MEANS_END), 0.0)
