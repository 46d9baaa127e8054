"""Training without accelerate, as a host does it, against accelerate's own."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from cached_data_set import configure
from tiny_run import TinyBase, read_checkpoint, set_up, train

from retrieval_core.training import training_run
from retrieval_core.training.single_device import SingleDevice


@pytest.fixture
def fresh_accelerate():
    """accelerate has one precision for a process, which other tests must not find changed."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    "changes",
    [{"accumulate": 2}, {"precision": "bf16", "checkpoint_activations": True, "steps": 4}],
)
def test_it_gives_accelerates_bits(tmp_path, changes, fresh_accelerate):
    expected = train(set_up(tmp_path / "accelerate", **changes))
    config = set_up(tmp_path / "single", **changes)
    training_run.train(config, TinyBase(), SingleDevice(torch.device("cpu"), config))
    tensors, state = read_checkpoint(config)
    assert state == expected[1]
    for name, value in expected[0].items():
        assert torch.equal(tensors[name], value), name


def test_scaled_losses_leave_gradients_and_steps_as_they_are():
    """fp16's scaler, tried on the CPU: a power of two scales float32 exactly."""
    weights = {}
    for precision in ("float32", "fp16"):
        torch.manual_seed(0)
        layer, inputs = torch.nn.Linear(3, 1), torch.randn(8, 3)
        config = configure(Path("none"), accumulate=2, precision=precision)
        device = SingleDevice(torch.device("cpu"), config)
        device.dtype = None
        optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
        forward, stepping = device.prepare(lambda x, layer=layer: layer(x), optimizer, None)
        norms = []
        for start in range(0, 8, 2):
            with device.accumulate(layer):
                device.backward(forward(inputs[start : start + 2]).square().mean())
                if device.sync_gradients:
                    norms.append(float(device.clip_grad_norm_(layer.parameters(), 0.1)))
                stepping.step()
                stepping.zero_grad()
        weights[precision] = layer.weight.detach(), norms
    assert len(weights["fp16"][1]) == 2
    assert torch.equal(weights["float32"][0], weights["fp16"][0])
    assert weights["float32"][1] == weights["fp16"][1]
