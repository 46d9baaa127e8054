"""The retrieval map: shares over steps, crops and applications, and what is drawn of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from retrieval_core.bank.site_bank import make_bank
from retrieval_core.bank.tokens import EncodedReference, join_references
from retrieval_core.network.retrieval_site import RetrievalSite
from retrieval_core.network.unet import SD15, SDXL, UNet, UNetConfig
from retrieval_core.paperdoll.model import CONFIG as PAPERDOLL
from retrieval_core.sampling import attention_map
from retrieval_core.sampling.applications import Applications, Retrieval
from retrieval_core.sampling.attention_map import (
    RecordedRetrieval,
    Shares,
    choose_map_site,
    draw_overlay,
    make_reference_masks,
    measure_shares,
    merge_shares,
)
from retrieval_core.sampling.frozen_site import freeze_site
from retrieval_core.training_free import (
    list_self_attention_layers,
)
from retrieval_core.training_free.latent_pull import choose_match_layer

DIM, HEADS = 16, 2
CONFIG = UNetConfig(32, (1, 2), (1, 1), (1, 1), 1, 16, num_head_channels=16)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_unet() -> UNet:
    made = UNet(CONFIG).eval().requires_grad_(False)
    for i, parameter in enumerate(made.parameters()):
        parameter.copy_((0.3 if parameter.ndim > 1 else 1.0) * rand(*parameter.shape, seed=i))
    return made


@pytest.fixture
def site():
    made = RetrievalSite(DIM, HEADS).eval().requires_grad_(False)
    for i, parameter in enumerate(made.parameters()):
        parameter.copy_(0.4 * rand(*parameter.shape, seed=i))
    return made


@pytest.fixture
def tokens():
    references = [
        EncodedReference({"s": rand(1, n, DIM, seed=n)}, weight)
        for n, weight in ((9, 1.0), (4, 0.5), (7, 1.0))
    ]
    return join_references(references)


@pytest.fixture
def retrieval(site, tokens):
    frozen = freeze_site(site, lambda layer: (layer.weight, layer.bias))
    return Retrieval(make_bank(tokens, {"s": site}, {"s": 1}), sites={"s": frozen})


def plain_shares(site: RetrievalSite, h: torch.Tensor, bank) -> torch.Tensor:
    """Attention weights in float64, position by position and head by head, summed by owner."""
    tokens = site.norm_query(h.flatten(2).transpose(1, 2))
    query, keys = site.to_q(tokens).double(), bank.keys[0].double()
    out = torch.zeros(len(h), 4, query.shape[1], dtype=torch.float64)
    dim = DIM // HEADS
    for row in range(len(h)):
        for position in range(query.shape[1]):
            for head in range(HEADS):
                part = slice(head * dim, (head + 1) * dim)
                logits = keys[:, part] @ query[row, position, part] / dim**0.5
                weights = torch.exp(logits + bank.bias[0].double())
                weights = weights / weights.sum()
                for owner, weight in zip(bank.owner.tolist(), weights, strict=True):
                    out[row, owner + 1, position] += weight / HEADS
    return out.view(len(h), 4, *h.shape[-2:])


@pytest.mark.parametrize("at_once", [1 << 24, 1, 150])
def test_shares_equal_the_attention_however_they_are_split(site, retrieval, monkeypatch, at_once):
    monkeypatch.setattr(attention_map, "_LOGITS", at_once)
    h, bank = rand(2, DIM, 3, 4), retrieval.bank.sites["s"]
    found = measure_shares(retrieval, "s", h, bank, 3)
    torch.testing.assert_close(found.double(), plain_shares(site, h, bank))


def test_recording_changes_nothing_and_reads_the_bank_before_merging(site, tokens, retrieval):
    whole, h = retrieval.bank.sites["s"], rand(4, DIM, 3, 4)
    plain = replace(retrieval, bank=make_bank(tokens, {"s": site}, {"s": 1}, 3))
    assert plain.bank.sites["s"].keys.shape[1] == 1 + 3 < whole.keys.shape[1]
    recorded = RecordedRetrieval(plain.bank, sites=plain.sites, recorded="s", seen=whole)
    hooks = [Applications([one]).hooks([1, 0], 0.5)["skip_hook"] for one in (plain, recorded)]
    for _ in range(2):
        assert torch.equal(*(hook("s", h) for hook in hooks))
    assert recorded.shares.seen.unique().tolist() == [2]
    expected = plain_shares(site, h[2:], whole)  # the conditional rows
    torch.testing.assert_close(recorded.shares.mean().double(), expected)


def test_a_region_takes_away_what_it_keeps_from_acting(retrieval):
    h, region, bank = rand(1, DIM, 4, 4), torch.zeros(4, 4), retrieval.bank.sites["s"]
    region[:, 2:] = 0.25
    shares = measure_shares(replace(retrieval, region=region), "s", h, bank, 3)
    plain = measure_shares(retrieval, "s", h, bank, 3)
    torch.testing.assert_close(shares[:, 1:, :, 2:], 0.25 * plain[:, 1:, :, 2:])
    assert float(shares[:, 1:, :, :2].max()) == 0.0
    torch.testing.assert_close(shares.sum(1), torch.ones(1, 4, 4))


def test_crops_are_averaged_where_they_lie():
    shares = Shares()
    left, right = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 3)
    shares.add(left, (4, 8), (0, 0))
    shares.add(right, (4, 8), (0, 3))
    mean = shares.mean()
    assert torch.equal(mean[..., :3], left[..., :3])
    torch.testing.assert_close(mean[..., 3], (left[..., 3] + right[..., 0]) / 2)
    assert torch.equal(mean[..., 4:6], right[..., 1:])
    assert torch.equal(mean[..., 6:], torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 4, 2))
    shares.add(torch.rand(2, 3, 4, 4))  # another run's shape starts anew
    assert shares.seen.unique().tolist() == [1] and shares.mean().shape == (2, 3, 4, 4)


def test_applications_together_never_retrieve_more_than_all():
    first = torch.tensor([0.4, 0.6]).view(1, 2, 1, 1)
    second = torch.tensor([0.2, 0.5, 0.3]).view(1, 3, 1, 1)
    together = merge_shares([first, second]).flatten()
    torch.testing.assert_close(together, torch.tensor([0.0, 0.6, 0.5, 0.3]) / 1.4)
    idle = merge_shares([first, torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)]).flatten()
    torch.testing.assert_close(idle, torch.tensor([0.4, 0.6, 0.0]))


def test_maps_of_different_resolutions_make_one_map():
    """A trained and a training-free application's, of 8x8 and 4x4; the coarse one interpolated."""
    means = [rand(1, 2, size, size, seed=size).softmax(1) for size in (8, 4)]
    fine, coarse = (mean[0, 1].double() for mean in means)
    spread = torch.zeros(8, 4, dtype=torch.float64)  # each pixel between its two nearest centres
    for pixel in range(8):
        at = min(max((pixel + 0.5) / 2 - 0.5, 0.0), 3.0)
        spread[pixel, int(at)] += 1 - at % 1
        spread[pixel, min(int(at) + 1, 3)] += at % 1
    retrieved = torch.stack([fine, spread @ coarse @ spread.T])
    retrieved = retrieved / retrieved.sum(0).clamp_min(1)
    expected = torch.cat([1 - retrieved.sum(0, keepdim=True), retrieved])[None]
    for order in ((0, 1), (1, 0)):
        merged = merge_shares([means[i] for i in order]).double()
        channels = [0, *(1 + i for i in order)]
        torch.testing.assert_close(merged, expected[:, channels], rtol=1e-5, atol=1e-5)


def test_masks_and_overlay_show_the_strongest_reference():
    shares = torch.zeros(1, 3, 2, 2)
    shares[0, :, 0, 0] = torch.tensor([0.1, 0.6, 0.3])
    shares[0, :, 0, 1] = torch.tensor([0.1, 0.2, 0.7])
    shares[0, :, 1, 0] = torch.tensor([0.8, 0.15, 0.05])  # mostly nothing
    shares[0, :, 1, 1] = torch.tensor([0.4, 0.29, 0.31])
    hard = make_reference_masks(shares, 2, 2, hard=True)[0]
    assert hard.tolist() == [[[1, 0], [0, 0]], [[0, 1], [0, 1]]]
    assert torch.equal(make_reference_masks(shares, 2, 2, hard=False), shares[:, 1:])
    picture = draw_overlay(torch.full((1, 3, 2, 2), 0.5), shares, [(1, 0, 0), (0, 0, 1)])
    assert picture[0, 0, 0, 0] > picture[0, 2, 0, 0] and picture[0, 2, 0, 1] > picture[0, 0, 0, 1]


def test_the_map_is_read_where_a_position_is_a_part_of_a_figure():
    """SD 1.5: 16x16 positions of 512x512; SDXL: 32x32 of 1024x1024; paper-doll: 8x8."""
    assert (choose_map_site(SD15), choose_map_site(SDXL), choose_map_site(PAPERDOLL)) == (
        "input_8",
        "input_8",
        "input_3",
    )
    for config, factor in ((SD15, 4), (SDXL, 4), (PAPERDOLL, 2)):
        assert config.site_downsampling()[choose_map_site(config)] == factor
        layers = list_self_attention_layers(config)
        assert layers[choose_match_layer(config)].downsampling == 2
