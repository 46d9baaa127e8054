"""The method against plain formulations in float64, written from the paper, not from the code."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from batched_tokens import batch_tokens
from refusal import sentence

from retrieval_core.bank.encoding import batch_features, encode_references
from retrieval_core.bank.site_bank import Bank, make_bank, make_network_bank
from retrieval_core.bank.tokens import (
    EncodedReference,
    check_weight,
    join_references,
)
from retrieval_core.network.controlnet import Card, RetrievalControlNet, select_decoder
from retrieval_core.network.unet import UNet, UNetConfig, attention
from retrieval_core.sampling.applications import Applications, Retrieval
from retrieval_core.sampling.attention_map import measure_shares
from retrieval_core.sampling.frozen_site import freeze_site, freeze_sites
from retrieval_core.sampling.noise_schedule import NoiseSchedule
from retrieval_core.training.correspondence import attend_from
from retrieval_core.training.objective import retrieval_loss

CONFIG = UNetConfig(32, (1, 2), (1, 1), (0, 1), 1, 16, num_head_channels=16)


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * (0.3 if parameter.ndim > 1 else 0.1))
    return module


@pytest.fixture(scope="module")
def unet() -> UNet:
    return randomised(UNet(CONFIG)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network() -> RetrievalControlNet:
    made = randomised(RetrievalControlNet(CONFIG, Card("paperdoll")), 1)
    return made.eval().requires_grad_(False)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def encode(network, latents, weights=None, masks=None) -> list[EncodedReference]:
    context = rand(len(latents), 3, 16, seed=5)
    return encode_references(network, latents, context, weights=weights, masks=masks)


def bank_of(network, references) -> Bank:
    return make_network_bank(network, join_references(references))


def retrieved(site, h, bank) -> torch.Tensor:
    """zero_conv(r) by the layers, as training uses them."""
    return site(h, bank.keys, bank.values, bank.bias)


def frozen(site):
    """The site as sampling uses it."""
    return freeze_site(site, lambda layer: (layer.weight.detach(), layer.bias))


def plain_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5) * weight + bias


def plain_retrieval(site, h, features, weights, keeps):
    """r = W_o softmax(q K^T / sqrt(d) + log w) V with loops over rows, heads and queries."""
    w = {k: v.double() for k, v in site.state_dict().items()}
    rows, channels, height, width = h.shape
    dim = channels // site.heads
    out = torch.zeros(rows, channels, height, width, dtype=torch.float64)
    keys, values, logs = [w["null_key.weight"][0]], [torch.zeros(channels).double()], [0.0]
    for f, weight, keep in zip(features, weights, keeps, strict=True):
        for token, kept in zip(f.flatten(1).T, keep, strict=True):
            if kept and weight > 0:
                normed = plain_layer_norm(
                    token, w["norm_reference.weight"], w["norm_reference.bias"]
                )
                keys.append(w["to_k.weight"] @ normed)
                values.append(w["to_v.weight"] @ normed)
                logs.append(math.log(weight))
    for b in range(rows):
        for y in range(height):
            for x in range(width):
                q = w["to_q.weight"] @ plain_layer_norm(
                    h[b, :, y, x], w["norm_query.weight"], w["norm_query.bias"]
                )
                gathered = torch.zeros(channels).double()
                for head in range(site.heads):
                    part = slice(head * dim, (head + 1) * dim)
                    logits = torch.stack(
                        [
                            q[part] @ k[part] / math.sqrt(dim) + log
                            for k, log in zip(keys, logs, strict=True)
                        ]
                    )
                    shares = torch.exp(logits - logits.max())
                    shares = shares / shares.sum()
                    gathered[part] = sum(s * v[part] for s, v in zip(shares, values, strict=True))
                r = w["to_out.weight"] @ gathered
                out[b, :, y, x] = w["zero_conv.weight"][:, :, 0, 0] @ r
    return out


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 1.7), (0.0, 2.0)])
def test_retrieval_at_a_site_equals_the_plain_formula(weights):
    double = randomised(RetrievalControlNet(CONFIG, Card("paperdoll")), 1).double()
    site = double.retrieval["input_1"]
    h = rand(2, 32, 3, 4, seed=2, dtype=torch.float64)
    features = [rand(32, 3, 2, seed=s, dtype=torch.float64) for s in (3, 4)]
    keeps = [torch.tensor([1, 0, 1, 1, 0, 1]).bool(), torch.ones(6).bool()]
    encoded = []
    for f, keep, weight in zip(features, keeps, weights, strict=True):
        encoded.append(EncodedReference({"input_1": f.flatten(1).T[keep][None]}, weight))
    bank = bank_of(double, encoded).sites["input_1"]
    expected = plain_retrieval(site, h, features, weights, keeps)
    torch.testing.assert_close(retrieved(site, h, bank), expected, rtol=1e-10, atol=1e-10)
    found = frozen(site).add_retrieved(h, bank, 0.7)
    torch.testing.assert_close(found, h + 0.7 * expected, rtol=1e-10, atol=1e-10)


def pooled_site(pool):
    made = RetrievalControlNet(CONFIG, Card("paperdoll"), query_pooling=pool)
    return randomised(made, 1).double().retrieval["input_0"]


def site_bank(site, features):
    encoded = [EncodedReference({"input_0": f.flatten(1).T[None]}) for f in features]
    bank = make_bank(join_references(encoded), {"input_0": site}, {"input_0": 1})
    return bank.sites["input_0"]


def retrieval_of(site, bank, **kw) -> Retrieval:
    references = int(bank.owner.max()) + 1
    return Retrieval(Bank({"input_0": bank}, references), sites={"input_0": site}, **kw)


def plain_spread(pooled, pool, height, width):
    """Bilinear interpolation from the middles of the squares, by a loop over positions."""
    out = torch.zeros(*pooled.shape[:2], height, width, dtype=pooled.dtype)
    rows, columns = pooled.shape[-2:]
    for y in range(height):
        for x in range(width):
            v, u = ((i + 0.5) / pool - 0.5 for i in (y, x))
            v, u = max(v, 0.0), max(u, 0.0)
            top, left = int(v), int(u)
            below, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            a, b = v - top, u - left
            out[..., y, x] = (
                (1 - a) * (1 - b) * pooled[..., top, left]
                + (1 - a) * b * pooled[..., top, right]
                + a * (1 - b) * pooled[..., below, left]
                + a * b * pooled[..., below, right]
            )
    return out


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3)])
def test_pooled_queries_ask_once_for_a_square(height, width):
    site = pooled_site(2)
    h = rand(2, 32, height, width, seed=2, dtype=torch.float64)
    features = [rand(32, 3, 2, seed=s, dtype=torch.float64) for s in (3, 4)]
    squares = torch.stack(
        [
            torch.stack(
                [
                    h[:, :, y : y + 2, x : x + 2].mean((2, 3))
                    for x in range(0, width, 2)
                ], -1,
            )
            for y in range(0, height, 2)
        ], -2,
    )  # fmt: skip
    bank, everything = site_bank(site, features), [torch.ones(6).bool()] * 2
    expected = plain_spread(
        plain_retrieval(site, squares, features, (1.0, 1.0), everything), 2, height, width
    )
    torch.testing.assert_close(retrieved(site, h, bank), expected, rtol=1e-10, atol=1e-10)
    # The way that sampling takes, with its region at full resolution, gives the same.
    region = torch.rand(height, width, generator=torch.Generator().manual_seed(0)).double()
    found = retrieval_of(frozen(site), bank, region=region).add_retrieved("input_0", h, [0], 1.5)
    torch.testing.assert_close(found, h + 1.5 * region * expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize(("edges", "squares"), [((0, 3), 9), ((2, 5), 12), ((4, 7), 9)])
def test_only_the_positions_of_a_region_query(pool, edges, squares):
    """A seventh of the picture is painted; the result is that of asking everywhere."""
    site = pooled_site(pool)
    h = rand(2, 32, 5, 7, seed=2, dtype=torch.float64)
    bank = site_bank(site, [rand(32, 3, 2, seed=3, dtype=torch.float64)])
    region = torch.zeros(5, 7, dtype=torch.float64)
    region[1:3, slice(*edges)] = 0.7
    asked = []

    def attend(q, k, v, heads, mask=None):
        asked.append(q.shape[1])
        return attention(q, k, v, heads, mask)

    with torch.no_grad():
        everywhere = retrieved(site, h, bank)
    one = retrieval_of(replace(frozen(site), attend=attend), bank, region=region)
    found = [one.add_retrieved("input_0", h, [0], 1.5) for _ in range(2)]
    torch.testing.assert_close(found[0], h + 1.5 * region * everywhere, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][..., region == 0], h[..., region == 0])
    # Rows share the bank, so theirs are one long query. Pooled: the squares that the six positions
    # lie in, and those beside them, of 3 x 4.
    assert asked == [2 * (6 if pool == 1 else squares)] * 2


def test_a_region_too_small_for_a_site_changes_nothing_there(network):
    bank, h = bank_of(network, encode(network, rand(1, 4, 8, 8))), rand(1, 32, 8, 8, seed=6)
    retrieval = Retrieval(bank, region=torch.zeros(16, 16), sites=freeze_sites(network))
    assert retrieval.add_retrieved("input_0", h, [0], 1.0) is h


def test_pooled_queries_in_maps_and_in_training_are_those_of_their_square():
    site, plain = pooled_site(2), pooled_site(1)
    h = rand(2, 32, 5, 3, seed=2, dtype=torch.float64)
    squares = torch.nn.functional.avg_pool2d(h, 2, ceil_mode=True, count_include_pad=False)
    bank = site_bank(site, [rand(32, 3, 2, seed=s, dtype=torch.float64) for s in (3, 4)])
    with torch.no_grad():
        shares, small = (
            measure_shares(retrieval_of(frozen(layer), bank), "input_0", x, bank, 2)
            for layer, x in ((site, h), (plain, squares))
        )
        torch.testing.assert_close(shares, plain_spread(small, 2, 5, 3))
        torch.testing.assert_close(shares.sum(1), torch.ones_like(shares[:, 0]))
        positions = torch.tensor([0, 4, 14, 15, 22])  # (y, x) 0,0; 1,1; 4,2; and of the second row
        asked = torch.tensor([0, 0, 5, 6, 6 + 2])
        found = attend_from(site, h, bank, positions)
        expected = attend_from(plain, squares, bank, asked)
    torch.testing.assert_close(found, expected)


def test_injection_adds_strength_times_region_times_retrieved(network):
    bank, h = bank_of(network, encode(network, rand(2, 4, 8, 8))), rand(2, 32, 8, 8, seed=6)
    region = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    added = retrieved(network.retrieval["input_0"], h, bank.sites["input_0"])
    retrieval = Retrieval(bank, 1.5, guidance="both", region=region, sites=freeze_sites(network))
    expected = h.double() + 1.5 * region.double() * added.double()
    found = Applications([retrieval]).hooks([0], 0.5)["skip_hook"]("input_0", h)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_region_of_zeros_is_exactly_the_base_there(network):
    bank, h = bank_of(network, encode(network, rand(2, 4, 8, 8))), rand(1, 32, 8, 8, seed=6)
    region = torch.zeros(8, 8)
    region[:, 4:] = 1
    retrieval = Retrieval(bank, region=region, sites=freeze_sites(network))
    found = retrieval.add_retrieved("input_0", h, [0], 1.0)
    assert torch.equal(found[..., :4], h[..., :4])
    assert (found[..., 4:] != h[..., 4:]).any()


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [1], [0], [0, 1, 0]])
def test_only_conditional_rows_retrieve(network, order):
    bank = bank_of(network, encode(network, rand(1, 4, 8, 8)))
    h = rand(2 * len(order), 32, 8, 8, seed=6)
    found, both = (
        Retrieval(bank, guidance=guidance, sites=freeze_sites(network)).add_retrieved(
            "input_0", h, order, 1.0
        )
        for guidance in ("cond", "both")
    )
    for i, chunk in enumerate(order):
        rows = slice(2 * i, 2 * i + 2)
        if chunk == 1:
            assert torch.equal(found[rows], h[rows])
        else:
            torch.testing.assert_close(found[rows], both[rows])
            assert not torch.equal(found[rows], h[rows])


def run(unet, *applications):
    x, steps, context = rand(2, 4, 8, 8, seed=7), torch.tensor([10, 900]), rand(2, 3, 16, seed=8)
    return unet(x, steps, context, **Applications(applications).hooks([0], 0.5))


def test_strength_zero_empty_bank_and_fresh_network_are_bit_for_bit_the_base(unet, network):
    base = run(unet)
    fresh = RetrievalControlNet.from_base(unet.state_dict(), "paperdoll", config=CONFIG)
    pooled = RetrievalControlNet.from_base(
        unet.state_dict(), "paperdoll", config=CONFIG, query_pooling=2
    )
    latents, sites = rand(3, 4, 8, 8), freeze_sites(network)
    bank = bank_of(network, encode(network, latents))
    cases = {
        "strength 0": Retrieval(bank, strength=0.0, sites=sites),
        "empty bank": Retrieval(bank_of(network, []), sites=sites),
        "outside the schedule": Retrieval(bank, start=0.6, sites=sites),
    }
    for name, net in {"fresh": fresh, "fresh, with pooled queries": pooled}.items():
        own = bank_of(net, encode(net, latents))
        cases[name] = Retrieval(own, guidance="both", sites=freeze_sites(net))
    for name, retrieval in cases.items():
        assert torch.equal(run(unet, retrieval), base), name
    assert not torch.equal(run(unet, Retrieval(bank, sites=sites)), base)


def test_the_fresh_encoder_is_the_base_encoder(unet):
    fresh = RetrievalControlNet.from_base(unet.state_dict(), "paperdoll", config=CONFIG)
    x, context = rand(2, 4, 8, 8), rand(2, 3, 16, seed=5)
    emb = unet.embed(torch.zeros(2), None, torch.float32)
    expected = unet.encode(x, emb, context)
    found = list(fresh.encoder(x, context).values())
    assert len(found) == len(CONFIG.site_channels())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_all_weight_on_the_null_token_leaves_the_position_as_it_was(network):
    tokens = {name: torch.full((1, 1, 1, 1, c), 7.0) for name, c in CONFIG.site_channels().items()}
    keep = {name: torch.zeros(1, 1, 1).bool() for name in tokens}
    bank = make_network_bank(network, batch_tokens(tokens, keep))
    h, retrieval = rand(1, 32, 8, 8), Retrieval(bank, sites=freeze_sites(network))
    assert torch.equal(retrieval.add_retrieved("input_0", h, [0], 1.0), h)


def test_a_batch_of_banks_equals_banks_one_by_one(network):
    latents, context, size = rand(4, 4, 8, 6), rand(4, 3, 16, seed=5), (8, 6)
    used, masks = torch.tensor([[True, True], [False, True]]), torch.ones(4, 8, 6).bool()
    masks[0, 2:] = False
    features = network.encode_features(latents, context)
    both = make_network_bank(network, batch_features(features, size, used, masks))
    encoded = encode(network, latents, masks=list(masks))
    site, h = network.retrieval["input_0"], rand(6, 32, 8, 8, seed=6)
    found = retrieved(site, h, both.sites["input_0"])
    for rows, references in ((slice(0, 3), encoded[:2]), (slice(3, 6), encoded[3:])):
        expected = retrieved(site, h[rows], bank_of(network, references).sites["input_0"])
        torch.testing.assert_close(found[rows], expected, rtol=1e-5, atol=1e-5)
    # Each chunk of rows is served by all banks, in sampling too.
    for guidance, negative in (("cond", h), ("both", h + found)):
        retrieval = Retrieval(both, guidance=guidance, sites=freeze_sites(network))
        served = retrieval.add_retrieved("input_0", torch.cat([h, h]), [1, 0], 1.0)
        expected = torch.cat([negative, h + found])
        torch.testing.assert_close(served, expected, rtol=1e-5, atol=1e-5)


def test_shares_add_up_and_follow_the_weights(network):
    encoded, h = encode(network, rand(2, 4, 8, 8)), rand(1, 32, 8, 8, seed=6)

    def shares(*weights):
        references = [r.with_weight(w) for r, w in zip(encoded, weights, strict=True)]
        bank = bank_of(network, references)
        retrieval = Retrieval(bank, sites=freeze_sites(network))
        return measure_shares(retrieval, "input_0", h, bank.sites["input_0"], 2)

    even = shares(1.0, 1.0)
    torch.testing.assert_close(even.sum(1), torch.ones(1, 8, 8))
    assert (shares(4.0, 1.0)[:, 1] > even[:, 1]).all()
    assert (shares(0.0, 1.0)[:, 1] == 0).all() and (shares(0.0, 1.0)[:, 2] > even[:, 2]).all()


def test_masked_tokens_are_not_in_the_bank(network):
    mask = torch.zeros(64, 64)
    mask[:16] = 1
    latents = rand(2, 4, 8, 8)
    whole, part = encode(network, latents, masks=[None, mask])
    assert whole.tokens["input_0"].shape[:2] == (1, 64)
    assert part.tokens["input_0"].shape[:2] == (1, 16)
    assert part.tokens["middle"].shape[:2] == (1, 4)
    features, size = network.encode_features(latents, rand(2, 3, 16, seed=5))["input_0"]
    assert size == (8, 8) and torch.equal(part.tokens["input_0"], features[1, :, :16])
    assert bank_of(network, [part]).sites["input_0"].keys.shape == (1, 17, 32)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_schedule_and_loss_against_plain_float64(prediction):
    schedule = NoiseSchedule(prediction=prediction)
    x0, eps = rand(3, 2, 4, 4, dtype=torch.float64), rand(3, 2, 4, 4, seed=1, dtype=torch.float64)
    steps = torch.tensor([0, 500, 999])
    betas = [
        (math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999) ** 2
        for i in range(1000)
    ]
    predicted = rand(3, 2, 4, 4, seed=2, dtype=torch.float64)
    content = (rand(3, 1, 4, 4, seed=3) > 0).double()
    face = (rand(3, 1, 4, 4, seed=4) > 0.5).double()
    total = 0.0
    for row, step in enumerate(steps.tolist()):
        abar = math.prod(1 - b for b in betas[: step + 1])
        noised = math.sqrt(abar) * x0[row] + math.sqrt(1 - abar) * eps[row]
        torch.testing.assert_close(schedule.noised(x0, eps, steps)[row], noised)
        target = eps[row]
        if prediction == "v":
            target = math.sqrt(abar) * eps[row] - math.sqrt(1 - abar) * x0[row]
        squares = (predicted[row] - target) ** 2
        for mask, factor in ((content, 1.0), (face, 2.5)):
            inside = mask[row].expand_as(squares) > 0
            total += factor * float(squares[inside].mean()) / 3 if inside.any() else 0.0
    loss = retrieval_loss(predicted, schedule.target(x0, eps, steps), content, face, 2.5)["loss"]
    assert float(loss) == pytest.approx(total, rel=1e-10)


def test_denoised_inverts_the_target_at_every_noise_level():
    for prediction in ("eps", "v"):
        schedule = NoiseSchedule(prediction=prediction)
        x0, eps = rand(4, 2, 3, 3, dtype=torch.float64), rand(4, 2, 3, 3, seed=1).double()
        steps = torch.tensor([0, 100, 700, 999])
        sigma = schedule.sigmas()[steps]
        x = x0 + sigma.view(-1, 1, 1, 1) * eps
        target = schedule.target(x0, eps, steps)
        found = schedule.denoised(target, x, sigma)
        torch.testing.assert_close(found, x0, rtol=1e-9, atol=1e-9)
        found = schedule.clean(target, schedule.noised(x0, eps, steps), steps)
        torch.testing.assert_close(found, x0, rtol=1e-9, atol=1e-9)


def test_padding_does_not_count():
    target = torch.zeros(1, 1, 4, 4)
    content = torch.zeros(1, 1, 4, 4)
    content[..., :2] = 1
    prediction = torch.where(content > 0, 1.0, 1e6)
    assert float(retrieval_loss(prediction, target, content)["loss"]) == 1.0


def test_apply_decoder_leaves_the_base_alone(unet, network):
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    network.decoder = {k: v + 1 for k, v in select_decoder(unet).items()}
    patched = network.apply_decoder(unet)
    assert not torch.equal(run(patched), run(unet))
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())
    network.decoder = {}
    assert network.apply_decoder(unet) is unet


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -0.5])
def test_bad_weights_are_refused(network, weight):
    (reference,) = encode(network, rand(1, 4, 8, 8))
    assert str(weight) in sentence(reference.with_weight, weight)
    assert str(weight) in sentence(check_weight, weight)
    assert str(weight) in sentence(join_references, [reference, replace(reference, weight=weight)])


def test_weights_all_zero_are_refused_and_no_references_are_an_empty_bank(network):
    encoded = encode(network, rand(2, 4, 8, 8), weights=[0, 0])
    assert "All 2 references have weight 0" in sentence(join_references, encoded)
    assert bank_of(network, []).empty and Bank().empty


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.4), (-0.1, 1), (0, 1.2)])
def test_a_bad_schedule_is_refused(start, end):
    assert f"starts at {start:g} and ends at {end:g}" in sentence(
        Retrieval, Bank(), start=start, end=end
    )
