"""The step-cost benchmark without a host: operation counts, ratios, table and refusals."""

from __future__ import annotations

import json

import pytest
import torch
from batched_tokens import batch_tokens
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from retrieval_core.bank.site_bank import Bank, SiteBank, make_bank
from retrieval_core.network.retrieval_site import RetrievalSite
from retrieval_core.network.unet import SD15, UNet, UNetConfig, UNetEncoder, attention
from retrieval_core.sampling.applications import Applications, Retrieval
from retrieval_core.sampling.frozen_site import freeze_site
from retrieval_core.training_free.latent_pull import take
from tests.benchmarks import arithmetic, external, reference_quality, step_cost, table, timing
from tests.benchmarks.timing import BASE, Sample

SMALL = UNetConfig(32, (1, 2), (1, 2), (1, 1), 1, 16, num_heads=4)
HEIGHT, WIDTH = 12, 8


class Counted:
    """Operations of linear layers, convolutions and attention, layer by layer as they run."""

    def __init__(self) -> None:
        self.total = 0

    def count(self, q, k) -> None:
        # Once for the logits and once for the values, whatever the number of heads.
        self.total += 2 * 2 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2]

    def attend(self, q, k, v, heads, mask=None):
        self.count(q, k)
        return attention(q, k, v, heads, mask)

    def watch(self, module: nn.Module) -> None:
        def ran(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            taken = layer.weight[0].numel()  # multiplications for one output value
            self.total += 2 * output.numel() * taken

        for layer in module.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.register_forward_hook(ran)


def inputs(rows: int):
    x = torch.randn(rows, SMALL.in_channels, HEIGHT, WIDTH)
    context = torch.randn(rows, arithmetic.TEXT_TOKENS, SMALL.context_dim)
    return x, torch.zeros(rows), context


@pytest.mark.parametrize("rows", [1, 2])
def test_the_base_models_operations_are_those_of_its_layers(rows):
    counted = Counted()
    unet = UNet(SMALL, attend=counted.attend).eval()
    counted.watch(unet)
    x, steps, context = inputs(rows)
    with torch.inference_mode():
        unet(x, steps, context)
    assert counted.total == arithmetic.base_operations(SMALL, rows, HEIGHT, WIDTH)
    counted.total = 0
    encoder = UNetEncoder(SMALL, attend=counted.attend).eval()
    counted.watch(encoder)
    with torch.inference_mode():
        encoder.encode(x, encoder.embed(steps, None, x.dtype), context)
    assert counted.total == arithmetic.encoder_operations(SMALL, rows, HEIGHT, WIDTH)


@pytest.mark.parametrize("pooling", [1, 2])
@pytest.mark.parametrize(("guidance", "rows"), [("both", 2), ("cond", 1)])
def test_the_floor_of_the_trained_mode_is_what_a_step_runs(guidance, rows, pooling):
    """What torch counts while retrieval runs on a batch of one row each of both kinds.

    Attention is counted here: torch counts its CPU kernel in some versions and not in others.
    """
    counted = Counted()

    def attend(q, k, v, heads, mask=None):
        counted.count(q, k)
        return torch.zeros_like(q)

    sites, banks, tokens, features = {}, {}, {}, {}
    factors = SMALL.site_downsampling()
    for i, (site, channels) in enumerate(SMALL.site_channels().items()):
        pool, heads = pooling if factors[site] == 1 else 1, SMALL.heads(channels)
        layer = RetrievalSite(channels, heads, attend=attend, pool=pool)
        sites[site] = freeze_site(layer, lambda one: (one.weight.detach(), one.bias))
        tokens[site] = 3 + 5 * i
        keys, values = (torch.randn(1, tokens[site], channels) for _ in range(2))
        banks[site] = SiteBank(keys, values, None, torch.zeros(tokens[site], dtype=torch.long))
        height, width = (-(-edge // factors[site]) for edge in (HEIGHT, WIDTH))
        features[site] = torch.randn(2, channels, height, width)
    found = {site: h[0, 0].numel() for site, h in features.items()}
    assert found == arithmetic.positions(SMALL, HEIGHT, WIDTH)
    retrieval = Retrieval(Bank(banks, 1), guidance=guidance, sites=sites)
    hook = Applications([retrieval]).hooks([0, 1], 0.5)["skip_hook"]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        for site, h in features.items():
            hook(site, h)
    floor = arithmetic.trained_operations(SMALL, rows, HEIGHT, WIDTH, tokens, pooling)
    assert counter.get_total_flops() + counted.total == floor


def test_the_floor_of_a_bank_is_what_its_projections_run():
    channels = SMALL.site_channels()
    layers = {site: RetrievalSite(width, SMALL.heads(width)) for site, width in channels.items()}
    counted = Counted()
    for layer in layers.values():
        counted.watch(layer)
    left = arithmetic.positions(SMALL, HEIGHT, WIDTH)
    features = {site: torch.randn(1, 1, 1, left[site], width) for site, width in channels.items()}
    make_bank(batch_tokens(features), layers, SMALL.site_downsampling())
    assert counted.total == arithmetic.projection_operations(SMALL, left)


def test_the_floor_of_the_training_free_mode_is_attention_to_the_appended_tokens():
    counted = Counted()
    q, own, more = (torch.randn(2, n, 32) for n in (20, 20, 27))
    counted.attend(q, own, own, 4)
    alone, counted.total = counted.total, 0
    counted.attend(q, more, more, 4)
    assert counted.total - alone == arithmetic.self_attention_operations({"a": (20, 32, 7)}, 2)


def test_the_floor_of_the_match_is_attention_of_one_head():
    """The operations of two products: keys with keys, and shares with values."""
    counted = FlopCounterMode(display=False)
    keys, bank = torch.randn(2, 20, 32), SiteBank(*torch.randn(2, 1, 7, 48), None, torch.zeros(7))
    with counted:
        take(keys, bank)
    products = arithmetic.match_operations(2, 20, 32, 48, 7)
    assert products <= counted.get_total_flops() <= 1.1 * products


def test_the_floors_of_sd15():
    """The figures of the plan: one reference adds a tenth, and a row half of two rows."""
    base = arithmetic.base_operations(SD15, 2, 64, 64)
    positions = arithmetic.positions(SD15, 64, 64)
    both, cond = (arithmetic.trained_operations(SD15, r, 64, 64, positions) for r in (2, 1))
    assert both == 2 * cond and 0.10 < both / base < 0.12
    four = {site: 4 * count + 1 for site, count in positions.items()}
    each, pooled = (arithmetic.trained_operations(SD15, 2, 64, 64, four, p) for p in (1, 2))
    assert 0.37 < each / base < 0.38 and 0.12 < pooled / base < 0.14
    assert 0.3 < arithmetic.controlnet_operations(SD15, 2, 64, 64) / base < 0.4


def test_ratios_are_free_of_the_machines_drift():
    clock = iter(range(1, 1000))
    factors = {BASE: 1.0, "a": 1.5, "b": 3.0, "c": 0.5}

    def step(name: str) -> Sample:
        drift = 1 + 0.01 * next(clock)  # the machine slows down all the time
        return Sample(factors[name] * drift, 100)

    seen = []
    series = timing.interleave(["a", "b", "c"], step, 3, lambda *state: seen.append(state))
    assert timing.sequence(["a", "b", "c"]) == [BASE, "a", "b", BASE, "c", BASE]
    assert seen[-1] == (BASE, 18, 18)
    for name, factor in factors.items():
        assert series[name].ratio == pytest.approx(factor, rel=0.03), name
        low, high = series[name].spread
        assert low <= series[name].ratio <= high
    assert len(series["a"].samples) == 3 and len(series[BASE].samples) == 9


def result() -> dict:
    slow = timing.Series([Sample(1.3, 3 << 20), Sample(1.2, 5 << 20)], [1.3, 1.2])
    base = timing.Series([Sample(1.0, 1 << 20)], [1.0])
    rows = [
        table.entry(BASE, BASE, base, 0, 0, 100),
        table.entry("t", "trained", slow, 20, 7 << 20, 100),
        table.entry("o", "other pack", slow, None, 0, 100),
    ]
    about = (
        "host",
        "torch",
        "device",
        "threads",
        "dtype",
        "dynamic VRAM",
        "base",
        "pixels",
        "memory",
    )
    once = [table.once("making it", timing.Series([Sample(2.0, 1)], [1.1, 1.0, 1.2]), 1.05)]
    return {
        **dict.fromkeys(about, "x"), "rows a call": [2], "base operations a step": 100,
        "steps": rows, "once": once,
    }  # fmt: skip


def test_the_table_shows_ratio_floor_and_factor():
    made = result()
    trained = made["steps"][1]
    assert trained["ratio"] == 1.25 and trained["spread"] == [1.2, 1.3]
    assert trained["floor"] == 1.2 and trained["factor"] == pytest.approx(1.25)
    assert (trained["peak MiB"], trained["bank MiB"]) == (5, 7.0)
    lines = table.text(made).splitlines()
    (row,) = [line.split() for line in lines if line.startswith("trained")]
    assert row == ["trained", "1.250", "1.250", "1.200-1.300", "1.200", "1.25", "5", "7.0"]
    (other,) = [line.split() for line in lines if line.startswith("other pack")]
    assert other[5:7] == ["-", "-"]
    assert any("making it: 1.100 (1.000-1.200), floor 1.050" in line for line in lines)
    json.dumps(made)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "100"], "100 pixels"),
        (["--size", "0"], "0 pixels"),  # not the same as no size
        (["--rounds", "0"], "0 rounds"),
        (["--references", "4", "0"], "[4, 0]"),
        (["--only", "trained-5-full-both"], "trained-5-full-both"),
    ],
)
def test_bad_arguments_get_one_sentence(capsys, arguments, words):
    assert step_cost.main(arguments) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and message.endswith(".\n")


def test_the_list_needs_no_host(capsys, monkeypatch):
    monkeypatch.delenv("IPADAPTER_PLUS_PATH", raising=False)
    monkeypatch.delenv("ADVANCED_CONTROLNET_PATH", raising=False)
    assert step_cost.main(["--list", "--references", "4"]) == 0
    keys = capsys.readouterr().out.split()
    assert "trained-4-budget-cond" in keys and "training-free-4-masked-both" in keys
    assert {"regions", "regions-apart", "controlnet"} <= set(keys)
    assert len(keys) == 2 * 3 * 2 + 3
    monkeypatch.setenv("IPADAPTER_PLUS_PATH", "/nowhere")
    assert step_cost.main(["--list"]) == 2
    assert "/nowhere" in capsys.readouterr().err


def test_the_quality_benchmark_needs_a_host_and_a_whole_checkout(capsys, monkeypatch):
    monkeypatch.delenv("ADVANCED_CONTROLNET_PATH", raising=False)
    monkeypatch.setattr(step_cost, "no_host_line", lambda: "Host tests (tests/host) skipped: none.")
    assert reference_quality.main([]) == 2
    assert capsys.readouterr().err == "It needs ComfyUI: none.\n"
    monkeypatch.setenv("ADVANCED_CONTROLNET_PATH", "/nowhere")
    assert reference_quality.main([]) == 2
    assert "/nowhere" in capsys.readouterr().err


def test_a_small_unets_blocks_answer_to_sd15s_numbers():
    """Each block once, in order; with twelve blocks, each by its own number."""
    for count in (6, 9, 12):
        unet = nn.Module()
        unet.input_blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(count))
        unet.output_blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(count))
        blocks = list(unet.output_blocks)
        with external.number_blocks_as_sd15(unet):
            found = [unet.output_blocks[i] for i in range(12)]
            assert list(unet.output_blocks) == blocks
        assert [block for block in found if block in blocks] == blocks
        assert list(unet.state_dict()) == [
            f"{half}.{i}.{name}"
            for half in ("input_blocks", "output_blocks")
            for i in range(count)
            for name in ("weight", "bias")
        ]


def test_without_a_host_it_says_so(capsys, monkeypatch):
    line = "Host tests (tests/host) skipped: no ComfyUI was found; to run them, set it."
    monkeypatch.setattr(step_cost, "no_host_line", lambda: line)
    assert step_cost.main(["--quick"]) == 2
    assert capsys.readouterr().err.startswith("It needs ComfyUI: no ComfyUI was found")
