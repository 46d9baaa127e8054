"""The state of a run, taken out of an optimiser and put back."""

import pytest
import torch
import torch.distributed
from torch.distributed.optim import ZeroRedundancyOptimizer

from retrieval_core.training.cpu_average import CpuAverage
from retrieval_core.training.run_folder import RunFolder
from retrieval_core.training.run_state import RunState

NESTED = "__nested__"


class Nesting(torch.optim.AdamW):
    """Gives its moments and a number as a dict inside a parameter's state, as bitsandbytes does."""

    def state_dict(self):
        told = super().state_dict()
        told["state"] = {
            index: {"step": v["step"], NESTED: {"exp_avg": v["exp_avg"], "bits": 8}}
            for index, v in told["state"].items()
        }
        return told

    def load_state_dict(self, told):
        self.loaded = told["state"]


def make(kind, is_sharded=False, **options):
    torch.manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(3, 2)) for name in ("a.weight", "b.weight")}
    groups = [{"params": [p], "lr": 0.1} for p in parameters.values()]
    optimizer = (
        ZeroRedundancyOptimizer(groups, kind, lr=0.1, **options)
        if is_sharded
        else kind(groups, **options)
    )
    return RunState(parameters, optimizer, CpuAverage({}, 0.0), None, is_sharded)


def take_step(state):
    for number, parameter in enumerate(state.parameters.values()):
        parameter.grad = torch.full_like(parameter, 1.0 + number)
    state.optimizer.step()


def test_nested_states_come_back_from_a_checkpoint_as_they_were(tmp_path):
    state, folder = make(Nesting), RunFolder(tmp_path, 1)
    take_step(state)
    folder.save(1, *state.collect())
    folder.wait()
    again = make(Nesting)
    again.restore(*folder.load_newest())
    expected = state.optimizer.state_dict()["state"]
    assert again.optimizer.loaded.keys() == expected.keys() == {0, 1}
    for index, values in expected.items():
        found = again.optimizer.loaded[index]
        assert found.keys() == values.keys() and torch.equal(found["step"], values["step"])
        assert found[NESTED]["bits"] == 8
        assert torch.equal(found[NESTED]["exp_avg"], values[NESTED]["exp_avg"])


@pytest.fixture
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


def test_a_share_is_restored_once_and_goes_on_as_before(one_process):
    state = make(torch.optim.AdamW, True, fused=True)
    take_step(state)
    state.gather_optimizer()
    saved = state.collect()
    again = make(torch.optim.AdamW, True, fused=True)
    again.restore(*saved)
    assert not again.optimizer.state  # beside the local optimiser's
    for one in (state, again):
        take_step(one)
    for name, parameter in state.parameters.items():
        assert torch.equal(again.parameters[name], parameter)
