"""The same weights, noise and conditioning in the core and in the host: the same picture."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import pytest
import torch
from making import noise, paperdoll_base, randomised
from retrieval_pack.nodes.host import encoded_references as references
from retrieval_pack.nodes.host.apply import apply_references
from retrieval_pack.nodes.host.loading import find_patcher_class
from retrieval_pack.nodes.host.paperdoll_host import HostVAE, make_clip, make_model
from retrieval_pack.nodes.host.trained_network import load_network
from retrieval_pack.retrieval_core.bank.encoding import encode_references
from retrieval_pack.retrieval_core.bank.site_bank import make_network_bank
from retrieval_pack.retrieval_core.bank.tokens import join_references
from retrieval_pack.retrieval_core.data.prepare import prepare
from retrieval_pack.retrieval_core.network.controlnet import (
    Card,
    RetrievalControlNet,
    load,
    select_decoder,
)
from retrieval_pack.retrieval_core.network.unet import UNet
from retrieval_pack.retrieval_core.paperdoll.model import load_base
from retrieval_pack.retrieval_core.sampling.applications import Retrieval
from retrieval_pack.retrieval_core.sampling.controls import Controls, group_sites, parse_curve
from retrieval_pack.retrieval_core.sampling.frozen_site import freeze_sites
from retrieval_pack.retrieval_core.sampling.sampler import make_guided_denoiser, sample

STEPS, CFG = 4, 2.0
CONTROLS = Controls(parse_curve("0.5, 1, 0.2"), (0.5, 1.0, 1.5), token_budget=None)
CASES = {
    "one": dict(count=1),
    "two": dict(count=2),
    "four": dict(count=4),
    "masks and weights": dict(count=4, masks=True, weights=(0.3, 1.7, 0.0, 1.0)),
    "both rows, part of sampling": dict(count=2, guidance="both", start=0.25, end=0.8),
    "region": dict(count=2, region=True),
    "decoder": dict(count=2, decoder=True, masks=True),
    "controls": dict(count=4, masks=True, start=0.1, end=0.9, controls=True),
    "pooled queries": dict(count=2, pooling=2, region=True),
    "regions kept apart": dict(count=2, apart=0.6),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    paperdoll_base(path)
    return load_base(path)


def halves():
    left = torch.zeros(16, 16)
    left[:, :8] = 1
    return left, 1 - left


def network_file(base, folder, decoder: bool, pooling: int):
    card = Card("paperdoll")
    made = randomised(RetrievalControlNet(base.unet.config, card, query_pooling=pooling), 1)
    if decoder:
        changed = select_decoder(randomised(UNet(base.unet.config), 2))
        made.decoder = {key: 0.1 * value for key, value in changed.items()}
    path = folder / "network.safetensors"
    made.save(path)
    return path


def pictures(count: int):
    generator = torch.Generator().manual_seed(4)
    images = torch.rand(count, 80, 48, 3, generator=generator)
    masks = torch.zeros(count, 40, 24)
    for i in range(count):
        masks[i, 4 + i : 30, 3 : 18 + i] = 1
    return images, masks


def in_the_core(base, path, count, masks, weights, decoder, sampler, strength=1.5, **kw):
    net = load(path).eval().requires_grad_(False)
    images, drawn = pictures(count)
    prepared = [
        prepare(images[i], drawn[i] if masks else None, "face", weights[i]) for i in range(count)
    ]
    encoded = encode_references(
        net,
        base.vae.encode(torch.stack([p.image for p in prepared])),
        base.text.encode(["face"] * count),
        masks=[p.mask for p in prepared],
        weights=weights,
    )
    sites = freeze_sites(net)

    def bank(references):
        return make_network_bank(net, join_references(references))

    if kw.pop("controls", False):
        strengths = CONTROLS.site_strengths(group_sites(base.unet.config))
        kw |= {"curve": CONTROLS.curve, "site_strength": strengths}
    apart = kw.pop("apart", 0.0)
    if apart:
        applied = [
            Retrieval(bank([one]), strength, region=region, apart=apart, sites=sites, **kw)
            for one, region in zip(encoded, halves(), strict=True)
        ]
    else:
        applied = [Retrieval(bank(encoded), strength, sites=sites, **kw)]
    cond, uncond = base.text.encode(["standing, smile"] * 2), base.text.encode([""] * 2)
    denoise = make_guided_denoiser(
        net.apply_decoder(base.unet), base.schedule, cond, uncond, CFG, applied
    )
    latents = sample(denoise, noise(2, 24, 16, 16), base.schedule, STEPS, sampler)
    return base.vae.decode(latents).movedim(1, -1)


def in_the_host(base, path, count, masks, weights, decoder, sampler, **kw):
    model, clip, vae = make_model(base, find_patcher_class()), make_clip(base), HostVAE(base.vae)
    net = load_network(path, model)
    images, drawn = pictures(count)
    refs = references.References(net)
    for i in range(count):  # one batch each, chained, as a user would for weights of their own
        mask = drawn[i : i + 1] if masks else None
        more = references.encode_references(
            net, images[i : i + 1], vae, clip, "face", weights[i], mask
        )
        refs = references.References(net, (*refs.encoded, *more))
    start, end = kw.pop("start", 0.0), kw.pop("end", 1.0)
    controls = CONTROLS if kw.pop("controls", False) else Controls(token_budget=None)
    apart = kw.pop("apart", 0.0)
    if apart:
        patched, controls = model, Controls(token_budget=None, apart=apart)
        for one, region in zip(refs.encoded, halves(), strict=True):
            alone = references.References(net, (one,))
            patched = apply_references(
                patched, alone, 1.5, start, end, region=region, controls=controls, **kw
            )
    else:
        patched = apply_references(model, refs, 1.5, start, end, controls=controls, **kw)
    sigmas = torch.cat([base.schedule.sigmas()[base.schedule.timesteps(STEPS)], torch.zeros(1)])
    cond, uncond = (
        [[clip.encode_from_tokens(clip.tokenize(text)), {}]] for text in ("standing, smile", "")
    )
    latents = comfy.sample.sample_custom(
        patched,
        noise(2, 24, 16, 16),
        CFG,
        comfy.samplers.sampler_object({"ddim": "euler", "dpmpp_2m": "dpmpp_2m"}[sampler]),
        sigmas.float(),
        cond,
        uncond,
        torch.zeros(2, 24, 16, 16),
        disable_pbar=True,
    )
    return vae.decode(latents)


@pytest.mark.parametrize(
    ("case", "sampler"), [*((case, "ddim") for case in CASES), ("two", "dpmpp_2m")]
)
def test_host_equals_core(base, tmp_path, case, sampler, record_property):
    chosen = {"masks": False, "weights": (1.0,) * 4, "decoder": False, **CASES[case]}
    if chosen.pop("region", False):
        chosen["region"] = torch.zeros(16, 16)
        chosen["region"][:, 5:] = 1
    path = network_file(base, tmp_path, chosen["decoder"], chosen.pop("pooling", 1))
    chosen["weights"] = chosen["weights"][: chosen["count"]]
    core = in_the_core(base, path, sampler=sampler, **chosen)
    host = in_the_host(base, path, sampler=sampler, **chosen)
    largest = float((core - host).abs().max())
    record_property("largest_difference", largest)
    print(f"\nparity, {case}, {sampler}: largest difference {largest:.2e} of {core.std():.2f}")
    torch.testing.assert_close(core, host, rtol=0, atol=1e-4)
    plain = in_the_core(base, path, sampler=sampler, **{**chosen, "strength": 0.0})
    assert (core - plain).abs().max() > 0.01
