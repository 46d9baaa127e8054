"""The samplers against textbook formulations in float64, and guidance against its formula."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from refusal import sentence

from retrieval_core.bank.encoding import encode_references, split_features
from retrieval_core.bank.site_bank import Bank, make_bank, make_network_bank
from retrieval_core.bank.tokens import join_references
from retrieval_core.network.controlnet import Card, RetrievalControlNet
from retrieval_core.network.unet import UNet, UNetConfig
from retrieval_core.sampling.applications import Retrieval
from retrieval_core.sampling.frozen_site import freeze_sites
from retrieval_core.sampling.noise_schedule import NoiseSchedule
from retrieval_core.sampling.sampler import make_guided_denoiser, sample
from retrieval_core.training_free import JointRetrieval, TrainingFree, name_layers, record

CONFIG = UNetConfig(32, (1, 2), (1, 1), (0, 1), 1, 16, num_head_channels=16)
MEAN, DEVIATION = 0.7, 0.6


def rand(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval().requires_grad_(False)


def plain_abars(schedule):
    """abar_t of scaled-linear betas, as a list of floats."""
    low, high = math.sqrt(schedule.beta_start), math.sqrt(schedule.beta_end)
    abar, abars = 1.0, []
    for i in range(schedule.steps):
        abar *= 1 - (low + (high - low) * i / (schedule.steps - 1)) ** 2
        abars.append(abar)
    return abars


def plain_timesteps(schedule, count):
    return [round((schedule.steps - 1) * (1 - i / count)) for i in range(count)]


def gaussian(abar, z):
    """E[x0 | z] for x0 ~ N(MEAN, DEVIATION^2) and z = sqrt(abar) x0 + sqrt(1 - abar) eps."""
    variance = abar * DEVIATION**2 + 1 - abar
    return MEAN + math.sqrt(abar) * DEVIATION**2 / variance * (z - math.sqrt(abar) * MEAN)


def curved(abar, z):
    """A denoiser that is not linear, so that wrong coefficients cannot cancel."""
    return torch.tanh(math.sqrt(abar) * z) + 0.1 * z * math.sqrt(1 - abar)


def in_sigma_space(schedule, denoiser):
    """The denoiser as `sample` calls it, on x = z / sqrt(abar)."""
    abars = plain_abars(schedule)
    return lambda x, timestep: denoiser(abars[timestep], x * math.sqrt(abars[timestep]))


def plain_ddim(denoiser, noise, schedule, count):
    """Song et al. 2020, equation 12 with eta 0, on z, ending at abar 1."""
    abars, steps, z = plain_abars(schedule), plain_timesteps(schedule, count), noise
    for step, following in pairwise([*steps, None]):
        abar, after = abars[step], 1.0 if following is None else abars[following]
        x0 = denoiser(abar, z)
        eps = (z - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        z = math.sqrt(after) * x0 + math.sqrt(1 - after) * eps
    return z


def plain_dpmpp_2m(denoiser, noise, schedule, count):
    """DPM-Solver++ (arXiv 2211.01095), algorithm 2, on z; the last step, to no noise, gives x0."""
    abars, steps, z = plain_abars(schedule), plain_timesteps(schedule, count), noise
    alphas = [math.sqrt(abars[t]) for t in steps]
    sigmas = [math.sqrt(1 - abars[t]) for t in steps]
    lambdas = [math.log(a / s) for a, s in zip(alphas, sigmas)]
    outputs = [denoiser(abars[steps[0]], z)]
    for i in range(1, count):
        h = lambdas[i] - lambdas[i - 1]
        if i == 1:
            mixed = outputs[0]
        else:
            r = (lambdas[i - 1] - lambdas[i - 2]) / h
            mixed = (1 + 1 / (2 * r)) * outputs[i - 1] - 1 / (2 * r) * outputs[i - 2]
        z = sigmas[i] / sigmas[i - 1] * z - alphas[i] * math.expm1(-h) * mixed
        outputs.append(denoiser(abars[steps[i]], z))
    return outputs[-1]


PLAIN = {"ddim": plain_ddim, "dpmpp_2m": plain_dpmpp_2m}


@pytest.mark.parametrize("denoiser", [gaussian, curved])
@pytest.mark.parametrize("count", [1, 2, 3, 16, 50])
@pytest.mark.parametrize("sampler", PLAIN)
def test_samplers_equal_their_textbook_form(sampler, count, denoiser):
    schedule, noise = NoiseSchedule(), rand(2, 3, 4, 4)
    found = sample(in_sigma_space(schedule, denoiser), noise, schedule, count, sampler)
    expected = PLAIN[sampler](denoiser, noise, schedule, count)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def error(sampler, count):
    """Largest distance to where the exact flow of a Gaussian takes the noise."""
    # Noise that falls off towards the clean end, so that the last step's error is not what counts.
    schedule, noise = NoiseSchedule(beta_start=1e-7, beta_end=0.02), rand(500)
    sigma = float(schedule.sigmas()[-1])
    start = noise * math.sqrt(1 + sigma**2)
    exact = MEAN + (start - MEAN) * DEVIATION / math.sqrt(sigma**2 + DEVIATION**2)
    found = sample(in_sigma_space(schedule, gaussian), noise, schedule, count, sampler)
    return float((found - exact).abs().max())


def test_both_converge_and_the_multistep_sampler_faster():
    counts = (25, 50, 100, 200)
    first, second = ([error(name, n) for n in counts] for name in ("ddim", "dpmpp_2m"))
    assert second[-1] < 1e-3 and first[-1] < 0.05
    for series, (least, most) in ((first, (1.6, 2.4)), (second, (3.0, 5.5))):
        for before, after in pairwise(series):
            assert least < before / after < most, (first, second)


def test_sampling_is_deterministic_and_leaves_the_noise_alone():
    schedule, noise = NoiseSchedule(prediction="v"), rand(2, 4, 8, 8, dtype=torch.float32)
    unet, cond = randomised(UNet(CONFIG)), rand(2, 3, 16, dtype=torch.float32)
    denoise = make_guided_denoiser(unet, schedule, cond, cond * 0, 3.0)
    before = noise.clone()
    torch.manual_seed(1)
    one = sample(denoise, noise, schedule, 4)
    torch.manual_seed(2)
    two = sample(denoise, noise, schedule, 4)
    assert one.isfinite().all() and torch.equal(one, two) and torch.equal(noise, before)
    assert one.dtype == torch.float32


def test_timesteps_fall():
    asked = []

    def denoise(x, timestep):
        asked.append(timestep)
        return x * 0

    end = sample(denoise, rand(1, 2), NoiseSchedule(), 5)
    assert asked == [999, 799, 599, 400, 200]
    assert not end.any()


def test_no_timestep_is_visited_twice():
    schedule = NoiseSchedule()
    for count in range(1, 1000):
        steps = schedule.timesteps(count).tolist()
        assert len(steps) == count and steps[0] == 999 and steps[-1] > 0
        assert all(a > b for a, b in pairwise(steps))


@pytest.mark.parametrize("sampler", PLAIN)
def test_the_most_steps_there_can_be(sampler):
    schedule = NoiseSchedule(steps=30)
    assert sample(lambda x, t: x * 0 + 2, rand(3), schedule, 29, sampler).isfinite().all()


@pytest.mark.parametrize("steps", [0, -3, 1000, 5000])
def test_bad_steps_are_refused(steps):
    message = sentence(sample, None, rand(1), NoiseSchedule(), steps)
    assert f"{steps} steps" in message and "between 1 and 999" in message


# Guidance


class Recording(torch.nn.Module):
    """Calls the U-Net and keeps what it was given."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.calls = unet, []

    def forward(self, x, timesteps, context, y=None, **hooks):
        self.calls.append((x, timesteps, context, hooks))
        return self.unet(x, timesteps, context, y, **hooks)


@pytest.fixture(scope="module")
def unet():
    return randomised(UNet(CONFIG)).double()


@pytest.fixture(scope="module")
def network():
    made = RetrievalControlNet(CONFIG, Card("paperdoll")).double()
    return randomised(made, 1)


@pytest.fixture(scope="module")
def retrieval(network):
    return applied(network)


def applied(network):
    """References of noise, as a trained network applies them."""
    encoded = encode_references(network, rand(2, 4, 8, 8, seed=3), rand(2, 3, 16, seed=4))
    bank = make_network_bank(network, join_references(encoded))
    return Retrieval(bank, sites=freeze_sites(network))


def retrieving(network, bank, strength):
    """A skip hook that adds what the layers of a network retrieve."""

    def hook(site, h):
        held = bank.sites[site]
        return h + strength * network.retrieval[site](h, held.keys, held.values, held.bias)

    return hook


def plain_step(schedule, x, timestep, predict, cfg):
    """x0 after guidance, where predict(z, steps, row) is the U-Net's of the two prompts."""
    abar = plain_abars(schedule)[timestep]
    z, steps = math.sqrt(abar) * x, torch.tensor([timestep] * len(x))
    positive, negative = predict(z, steps, 0), predict(z, steps, 1)
    guided = negative + cfg * (positive - negative)
    if schedule.prediction == "eps":
        return (z - math.sqrt(1 - abar) * guided) / math.sqrt(abar)
    return math.sqrt(abar) * z - math.sqrt(1 - abar) * guided


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("cfg", [0.0, 1.0, 2.5, 7.0])
def test_guidance_is_the_formula(unet, cfg, prediction):
    schedule, prompts = NoiseSchedule(prediction=prediction), rand(2, 2, 3, 16, seed=1)
    x, timestep, recorder = rand(2, 4, 8, 8) * 5, 600, Recording(unet)
    expected = plain_step(
        schedule, x, timestep, lambda z, steps, row: unet(z, steps, prompts[row]), cfg
    )
    found = make_guided_denoiser(recorder, schedule, *prompts, cfg)(x, timestep)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    ((seen, at, context, hooks),) = recorder.calls
    rows = 2 if cfg == 1.0 else 4
    assert len(seen) == len(at) == len(context) == rows and hooks == {}
    assert torch.equal(context[:2], prompts[0])


@pytest.mark.parametrize("guidance", ["cond", "both"])
def test_retrieval_acts_on_the_rows_that_guidance_names(unet, network, retrieval, guidance):
    schedule, prompts = NoiseSchedule(), rand(2, 2, 3, 16, seed=1)
    x, timestep, hook = rand(2, 4, 8, 8), 300, retrieving(network, retrieval.bank, 1.5)

    def predict(z, steps, row):
        acts = row == 0 or guidance == "both"
        return unet(z, steps, prompts[row], skip_hook=hook if acts else None)

    one = replace(retrieval, strength=1.5, guidance=guidance)
    found = make_guided_denoiser(unet, schedule, *prompts, 3.0, [one])(x, timestep)
    expected = plain_step(schedule, x, timestep, predict, 3.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_schedule_says_at_which_steps_retrieval_acts(unet, retrieval):
    schedule, context = NoiseSchedule(), rand(1, 3, 16)
    recorder = Recording(unet)
    some = replace(retrieval, start=0.15, end=0.45)
    denoise = make_guided_denoiser(recorder, schedule, context, context, 1.0, [some])
    sample(denoise, rand(1, 4, 8, 8), schedule, 10)
    acted = ["skip_hook" in hooks for *_, hooks in recorder.calls]
    # Fractions 0, 0.1, ... of the way from all noise to none.
    assert acted == [False] * 2 + [True] * 3 + [False] * 5


def test_a_step_costs_one_attention_a_site_and_calls_no_layer_of_the_network(
    unet, network, retrieval
):
    """References are encoded and projected before sampling, and the query side is frozen."""
    layers, attended = [], []
    handles = [
        module.register_forward_hook(lambda *_: layers.append(1)) for module in network.modules()
    ]

    def counted(site):
        def attend(*arguments, **named):
            attended.append(len(arguments[0]))
            return site.attend(*arguments, **named)

        return replace(site, attend=attend)

    sites = {name: counted(site) for name, site in retrieval.sites.items()}
    context = rand(1, 3, 16)
    denoise = make_guided_denoiser(
        unet, NoiseSchedule(), context, context, 2.0, [replace(retrieval, sites=sites)]
    )
    sample(denoise, rand(1, 4, 8, 8), NoiseSchedule(), 3)
    for handle in handles:
        handle.remove()
    assert layers == [] and attended == [1] * 3 * len(CONFIG.site_channels())


def test_whole_sampling_without_retrieval_is_bit_for_bit_the_base(unet, retrieval):
    schedule, noise, prompts = NoiseSchedule(), rand(1, 4, 8, 8), rand(2, 1, 3, 16, seed=1)
    fresh = RetrievalControlNet.from_base(unet.state_dict(), "paperdoll", config=CONFIG)
    fresh = fresh.double().eval().requires_grad_(False)

    def end(*applications):
        return sample(
            make_guided_denoiser(unet, schedule, *prompts, 3.0, applications), noise, schedule, 3
        )

    base = end()
    assert torch.equal(end(replace(retrieval, strength=0.0)), base)
    assert torch.equal(end(replace(retrieval, bank=make_bank(join_references([]), {}, {}))), base)
    assert torch.equal(end(replace(applied(fresh), guidance="both")), base)
    assert not torch.equal(end(retrieval), base)


# Several applications


@pytest.fixture(scope="module")
def joint(unet):
    """A reference of noise, as the training-free mode applies it."""
    network = TrainingFree.from_unet(unet, "paperdoll", layers="all")
    features = record(unet, NoiseSchedule(), network, rand(1, 4, 8, 8), rand(1, 3, 16))
    features = {site: features[site] for site in network.maker.sites}
    encoded = split_features(features, (8, 8), [None])
    bank = make_bank(join_references(encoded), None, network.site_downsampling())
    return JointRetrieval(bank, names=name_layers(unet), timesteps=network.timesteps())


def test_trained_and_training_free_applications_act_together(unet, network, retrieval, joint):
    """In one denoising step, each on the rows that its own guidance names."""
    schedule, prompts = NoiseSchedule(), rand(2, 2, 3, 16, seed=1)
    x, skip = rand(2, 4, 8, 8), retrieving(network, retrieval.bank, 1.0)

    def attend(layer, size, q, k, v, heads):
        """The layer's own tokens and the bank's in one softmax, these 3 times as often."""
        bank = joint.bank.sites[f"{joint.names[layer]}@500"]
        k = torch.cat([k, bank.keys.expand(len(k), -1, -1)], 1)
        v = torch.cat([v, bank.values.expand(len(v), -1, -1)], 1)
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        shares = (q @ k.mT / q.shape[-1] ** 0.5).exp()
        shares[..., -bank.keys.shape[1] :] *= 3
        out = shares / shares.sum(-1, keepdim=True) @ v
        return out.transpose(1, 2).flatten(2)

    def predict(z, steps, row):
        return unet(
            z,
            steps,
            prompts[row],
            skip_hook=None if row else skip,
            self_attention=attend,
        )

    expected = plain_step(schedule, x, 500, predict, 2.0)
    free = replace(joint, strength=3.0, guidance="both")
    for applications in ([retrieval, free], [free, retrieval]):
        found = make_guided_denoiser(unet, schedule, *prompts, 2.0, applications)(x, 500)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for alone in (retrieval, free):
        found = make_guided_denoiser(unet, schedule, *prompts, 2.0, [alone])(x, 500)
        assert (found - expected).abs().max() > 1e-3


# What a retrieval refuses


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf])
def test_a_strength_that_is_no_number_is_refused(strength):
    assert str(strength) in sentence(Retrieval, Bank(), strength)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_region_works_in_every_type(network, dtype):
    made = copy.deepcopy(network).to(dtype)
    region = torch.zeros(20, 20)
    region[:, 10:] = 1
    h = rand(1, 32, 8, 8, dtype=dtype)
    one = applied(network)
    one = replace(one, bank=one.bank.to("cpu", dtype), sites=freeze_sites(made), region=region)
    found = one.add_retrieved("input_0", h, [0], 1.0)
    assert found.dtype == dtype
    assert torch.equal(found[..., :3], h[..., :3])
    assert not torch.equal(found[..., 5:], h[..., 5:])
