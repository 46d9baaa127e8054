"""The step-cost benchmark end to end, on a tiny U-Net of SD 1.5's kind."""

from __future__ import annotations

import json

import comfy.cldm.cldm
import comfy.ops
import pytest
import torch
from lazy_layers import give_weights
from torch.utils.flop_counter import FlopCounterMode

from retrieval_core.network.unet import UNetConfig
from tests.benchmarks import arithmetic, hosting, step_cost, table
from tests.benchmarks.variants import Workbench

TINY = UNetConfig(320, (1,), (1,), (1,), 1, 768, num_heads=8)


@pytest.fixture(scope="module")
def measured():
    hosting.start(cpu=True)
    options = step_cost.arguments(["--size", "128", "--rounds", "1", "--references", "1", "8"])
    return step_cost.measure(options, False, TINY)


def test_every_variant_is_measured_beside_the_base(measured):
    rows = {row["key"]: row for row in measured["steps"]}
    assert len(rows) == 1 + 2 * 2 * 3 * 2 + 3
    assert measured["rows a call"] == [2]  # both prompts in one call
    for key, row in rows.items():
        assert row["seconds a step"] > 0 and row["peak MiB"] > 0
        # Regions kept apart save self-attention, as much of it as the base has.
        assert (row["floor"] > 1) == (key != "base model") or key == "regions-apart"
    assert rows["regions-apart"]["floor"] < rows["regions"]["floor"]
    encoding, *banks = measured["once"]
    assert encoding["floor"] == 1 and all(one["ratio"] > 0 for one in measured["once"])
    assert 0 < banks[0]["floor"] <= banks[1]["floor"] < 1
    text = table.text(json.loads(json.dumps(measured)))
    assert all(row["title"] in text for row in rows.values())


def test_floors_follow_references_rows_masks_and_budget(measured):
    floor = {row["key"]: row["floor"] - 1 for row in measured["steps"]}
    bank = {row["key"]: row["bank MiB"] for row in measured["steps"]}
    for mode in ("trained", "training-free"):
        assert floor[f"{mode}-8-full-both"] > 3 * floor[f"{mode}-1-full-both"]
        both, cond = floor[f"{mode}-8-full-both"], floor[f"{mode}-8-full-cond"]
        assert floor[f"{mode}-8-masked-both"] < 0.7 * both
        assert floor[f"{mode}-8-budget-both"] < 0.7 * both
        masked, full = (bank[f"{mode}-8-{what}-both"] for what in ("masked", "full"))
        if mode == "trained":
            assert both == pytest.approx(2 * cond, rel=0.01)
            assert masked == pytest.approx(0.4 * full, rel=0.2)
        else:  # only the positive prompts' rows are matched, with the keys outside a mask too
            assert cond < both < 2 * cond
            assert 0.4 * full < masked < 0.7 * full


def test_the_controlnets_operations_are_those_of_the_hosts():
    hosting.start(cpu=True)
    bench = Workbench(hosting.base_model(TINY), TINY, 64)
    left_out = ("out_channels", "disable_unet_model_creation", "dtype", "device")
    settings = bench.model.model.model_config.unet_config.items()
    net = comfy.cldm.cldm.ControlNet(
        **{name: value for name, value in settings if name not in left_out},
        hint_channels=3,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    give_weights(net)
    x, hint = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 64, 64)
    context = torch.randn(2, arithmetic.TEXT_TOKENS, 768)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        net(x=x, hint=hint, timesteps=torch.zeros(2), context=context)
    assert counter.get_total_flops() == arithmetic.controlnet_operations(TINY, 2, 8, 8)
