"""The method against plain formulations in float64, written from the paper, not from the code."""

from __future__ import annotations

import math

import pytest
import torch

from retrieval_core.bank.site_bank import Bank, project
from retrieval_core.bank.tokens import EncodedReference, gather, stack
from retrieval_core.errors import RetrievalError
from retrieval_core.network.controlnet import Card, RetrievalControlNet, decoder_state
from retrieval_core.network.unet import UNet, UNetConfig, attention
from retrieval_core.sampling.applications import Retrieval
from retrieval_core.sampling.noise_schedule import NoiseSchedule
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
def test_retrieval_at_a_site_equals_the_plain_formula(network, weights):
    site = network.retrieval["input_1"]
    h = rand(2, 32, 3, 4, seed=2, dtype=torch.float64)
    features = [rand(32, 3, 2, seed=s, dtype=torch.float64) for s in (3, 4)]
    keeps = [torch.tensor([1, 0, 1, 1, 0, 1]).bool(), torch.ones(6).bool()]
    double = randomised(RetrievalControlNet(CONFIG, Card("paperdoll")), 1).double()
    site = double.retrieval["input_1"]
    encoded = []
    for f, keep, weight in zip(features, keeps, weights, strict=True):
        encoded.append(EncodedReference({"input_1": f.flatten(1).T[keep][None]}, weight))
    bank = project(gather(encoded), double.retrieval)
    found = site(h, bank.sites["input_1"])
    expected = plain_retrieval(site, h, features, weights, keeps)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def pooled_site(pool):
    made = RetrievalControlNet(CONFIG, Card("paperdoll"), query_pooling=pool)
    return randomised(made, 1).double().retrieval["input_0"]


def bank_of(site, features):
    encoded = [EncodedReference({"input_0": f.flatten(1).T[None]}) for f in features]
    return project(gather(encoded), {"input_0": site}).sites["input_0"]


def plain_spread(pooled, pool, height, width):
    """Bilinear interpolation from the middles of the squares, by a loop over places."""
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
    bank, everything = bank_of(site, features), [torch.ones(6).bool()] * 2
    expected = plain_spread(
        plain_retrieval(site, squares, features, (1.0, 1.0), everything), 2, height, width
    )
    torch.testing.assert_close(site(h, bank), expected, rtol=1e-10, atol=1e-10)
    # The way that sampling takes, with its region at full resolution, gives the same.
    region = torch.rand(height, width, generator=torch.Generator().manual_seed(0)).double()
    retrieval = Retrieval({"input_0": site}, Bank({"input_0": bank}, 2), 1.5, region=region)
    with torch.no_grad():
        found = retrieval.apply("input_0", h, [0])
    torch.testing.assert_close(found, h + 1.5 * region * expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize(("edges", "squares"), [((0, 3), 9), ((2, 5), 12), ((4, 7), 9)])
def test_only_the_places_of_a_region_are_asked_for(pool, edges, squares):
    """A seventh of the picture is painted; the result is that of asking everywhere."""
    site = pooled_site(pool)
    h = rand(2, 32, 5, 7, seed=2, dtype=torch.float64)
    bank = bank_of(site, [rand(32, 3, 2, seed=3, dtype=torch.float64)])
    region = torch.zeros(5, 7, dtype=torch.float64)
    region[1:3, slice(*edges)] = 0.7
    asked = []

    def attend(q, k, v, heads, mask=None):
        asked.append(q.shape[1])
        return attention(q, k, v, heads, mask)

    with torch.no_grad():
        everywhere = site(h, bank)
        site.attend = attend
        retrieval = Retrieval({"input_0": site}, Bank({"input_0": bank}, 1), 1.5, region=region)
        found = [retrieval.apply("input_0", h, [0]) for _ in range(2)]
    torch.testing.assert_close(found[0], h + 1.5 * region * everywhere, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][..., region == 0], h[..., region == 0])
    # Rows share the bank, so theirs are one long query. Pooled: the squares that the six places
    # lie in, and those beside them, of 3 x 4.
    assert asked == [2 * (6 if pool == 1 else squares)] * 2


def test_a_region_too_small_for_a_site_asks_for_nothing_there(network):
    bank = network.bank(network.encode(rand(1, 4, 8, 8), rand(1, 3, 16, seed=5)))
    h = rand(1, 32, 8, 8, seed=6)
    retrieval = Retrieval(network.retrieval, bank, region=torch.zeros(16, 16))
    with torch.no_grad():
        assert retrieval.apply("input_0", h, [0]) is h


def test_pooled_queries_in_maps_and_in_training_are_those_of_their_square():
    site, plain = pooled_site(2), pooled_site(1)
    h = rand(2, 32, 5, 3, seed=2, dtype=torch.float64)
    bank = bank_of(site, [rand(32, 3, 2, seed=s, dtype=torch.float64) for s in (3, 4)])
    with torch.no_grad():
        shares = site.shares(h, bank, 2)
        assert shares.shape == (2, 3, 5, 3)
        torch.testing.assert_close(shares.sum(1), torch.ones_like(shares[:, 0]))
        squares = torch.nn.functional.avg_pool2d(h, 2, ceil_mode=True, count_include_pad=False)
        places = torch.tensor([0, 4, 14, 15, 22])  # (y, x) 0,0; 1,1; 4,2; and of the second row
        asked = torch.tensor([0, 0, 5, 6, 6 + 2])
        found = site.attention_at(h, bank, places)
        expected = plain.attention_at(squares, bank, asked)
    torch.testing.assert_close(found, expected)


def test_injection_adds_strength_times_region_times_retrieved(network):
    bank = network.bank(network.encode(rand(2, 4, 8, 8), rand(2, 3, 16, seed=5)))
    h = rand(2, 32, 8, 8, seed=6)
    region = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    added = network.retrieval["input_0"](h, bank.sites["input_0"])
    retrieval = Retrieval(network.retrieval, bank, strength=1.5, guidance="both", region=region)
    expected = h.double() + 1.5 * region.double() * added.double()
    found = retrieval.apply("input_0", h, [0])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_region_of_zeros_is_exactly_the_base_there(network):
    bank = network.bank(network.encode(rand(2, 4, 8, 8), rand(2, 3, 16, seed=5)))
    h = rand(1, 32, 8, 8, seed=6)
    region = torch.zeros(8, 8)
    region[:, 4:] = 1
    found = Retrieval(network.retrieval, bank, region=region).apply("input_0", h, [0])
    assert torch.equal(found[..., :4], h[..., :4])
    assert (found[..., 4:] != h[..., 4:]).any()


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [1], [0], [0, 1, 0]])
def test_only_conditional_rows_retrieve(network, order):
    bank = network.bank(network.encode(rand(1, 4, 8, 8), rand(1, 3, 16, seed=5)))
    h = rand(2 * len(order), 32, 8, 8, seed=6)
    found = Retrieval(network.retrieval, bank, guidance="cond").apply("input_0", h, order)
    both = Retrieval(network.retrieval, bank, guidance="both").apply("input_0", h, order)
    for i, chunk in enumerate(order):
        rows = slice(2 * i, 2 * i + 2)
        if chunk == 1:
            assert torch.equal(found[rows], h[rows])
        else:
            torch.testing.assert_close(found[rows], both[rows])
            assert not torch.equal(found[rows], h[rows])


def run(unet, hook=None):
    x, steps, context = rand(2, 4, 8, 8, seed=7), torch.tensor([10, 900]), rand(2, 3, 16, seed=8)
    return unet(x, steps, context, skip_hook=hook)


def test_strength_zero_empty_bank_and_fresh_network_are_bit_for_bit_the_base(unet, network):
    base = run(unet)
    latents, context = rand(3, 4, 8, 8), rand(3, 3, 16, seed=5)
    bank = network.bank(network.encode(latents, context))
    fresh = RetrievalControlNet.from_base(unet.state_dict(), "paperdoll", config=CONFIG)
    fresh_bank = fresh.bank(fresh.encode(latents, context))
    cases = {
        "strength 0": Retrieval(network.retrieval, bank, strength=0.0),
        "empty bank": Retrieval(network.retrieval, network.bank([])),
        "fresh": Retrieval(fresh.retrieval, fresh_bank, guidance="both"),
        "outside the schedule": Retrieval(network.retrieval, bank, start=0.6),
    }
    for name, retrieval in cases.items():
        assert torch.equal(run(unet, retrieval.hook([0], 0.5)), base), name
    on = Retrieval(network.retrieval, bank).hook([0], 0.5)
    assert not torch.equal(run(unet, on), base)


def test_the_fresh_encoder_is_the_base_encoder(unet):
    fresh = RetrievalControlNet.from_base(unet.state_dict(), "paperdoll", config=CONFIG)
    x, context = rand(2, 4, 8, 8), rand(2, 3, 16, seed=5)
    emb = unet.embed(torch.zeros(2), None, torch.float32)
    expected = unet.encode(x, emb, context)
    found = list(fresh.encoder(x, context).values())
    assert len(found) == len(CONFIG.site_channels())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_all_weight_on_the_null_token_leaves_the_place_as_it_was(network):
    tokens = {name: torch.full((1, 1, 2, 1, c), 7.0) for name, c in CONFIG.site_channels().items()}
    keep = {name: torch.zeros(1, 1, 1).bool() for name in tokens}
    bank = network.project(stack(tokens, keep))
    h = rand(1, 32, 8, 8)
    assert torch.equal(Retrieval(network.retrieval, bank).apply("input_0", h, [0]), h)


def test_banks_side_by_side_equal_banks_one_by_one(network):
    latents, context = rand(4, 4, 8, 8), rand(4, 3, 16, seed=5)
    reading = network.read(latents, context)
    split = {site: f.unflatten(0, (2, 2)) for site, (f, _) in reading.items()}
    both = network.project(stack(split))
    encoded = network.encode(latents, context)
    h = rand(6, 32, 8, 8, seed=6)
    found = network.retrieval["input_0"](h, both.sites["input_0"])
    for group in range(2):
        bank = network.bank(encoded[2 * group : 2 * group + 2])
        rows = slice(3 * group, 3 * group + 3)
        expected = network.retrieval["input_0"](h[rows], bank.sites["input_0"])
        torch.testing.assert_close(found[rows], expected, rtol=1e-5, atol=1e-5)


def test_shares_add_up_and_follow_the_weights(network):
    encoded = network.encode(rand(2, 4, 8, 8), rand(2, 3, 16, seed=5))
    h = rand(1, 32, 8, 8, seed=6)
    site = network.retrieval["input_0"]
    even = site.shares(h, network.bank(encoded).sites["input_0"], 2)
    torch.testing.assert_close(even.sum(1), torch.ones(1, 8, 8))
    heavy = [encoded[0].with_weight(4.0), encoded[1]]
    skewed = site.shares(h, network.bank(heavy).sites["input_0"], 2)
    assert (skewed[:, 1] > even[:, 1]).all()
    only = [encoded[0].with_weight(0.0), encoded[1]]
    assert (site.shares(h, network.bank(only).sites["input_0"], 2)[:, 1] == 0).all()


def test_masked_tokens_are_not_in_the_bank(network):
    mask = torch.zeros(64, 64)
    mask[:16] = 1
    whole, part = network.encode(rand(2, 4, 8, 8), rand(2, 3, 16, seed=5), masks=[None, mask])
    assert whole.tokens["input_0"].shape[:2] == (1, 64)
    assert part.tokens["input_0"].shape[:2] == (1, 16)
    assert part.tokens["middle"].shape[:2] == (1, 4)
    read, _ = network.read(rand(2, 4, 8, 8), rand(2, 3, 16, seed=5))["input_0"]
    assert torch.equal(part.tokens["input_0"], read[1, :, :16])


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
    network.decoder = {k: v + 1 for k, v in decoder_state(unet).items()}
    patched = network.apply_decoder(unet)
    assert not torch.equal(run(patched), run(unet))
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())
    network.decoder = {}
    assert network.apply_decoder(unet) is unet


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -0.5])
def test_bad_weights_are_refused(network, weight):
    (reference,) = network.encode(rand(1, 4, 8, 8), rand(1, 3, 16, seed=5))
    with pytest.raises(RetrievalError, match=str(weight)):
        reference.with_weight(weight)


def test_weights_all_zero_are_refused_and_no_references_are_an_empty_bank(network):
    encoded = network.encode(rand(2, 4, 8, 8), rand(2, 3, 16, seed=5), weights=[0, 0])
    with pytest.raises(RetrievalError, match="All 2 references have weight 0"):
        network.bank(encoded)
    assert network.bank([]).empty and Bank().empty


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.4), (-0.1, 1), (0, 1.2)])
def test_a_bad_schedule_is_refused(network, start, end):
    with pytest.raises(RetrievalError, match="start"):
        Retrieval(network.retrieval, Bank(), start=start, end=end)
