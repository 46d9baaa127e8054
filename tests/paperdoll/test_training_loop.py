"""The loop's arithmetic against plain formulations, and what it does when things go wrong."""

import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import Owner, TinyBatches, copy_averages, everything, settings, trainer

from retrieval_core.errors import RetrievalError
from retrieval_core.paperdoll.ema import ExponentialMovingAverage
from retrieval_core.paperdoll.trainer import Trainer
from retrieval_core.training.paper_objective import seed_generator


class Quadratic(torch.nn.Module):
    """Minimise |matrix - 1|^2 / 2 + |vector|^2 / 2, in float64."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).double())
        self.vector = torch.nn.Parameter(torch.tensor([3.0, -2.0]).double())

    def loss(self, batch, generator):
        return {"loss": ((self.matrix - 1) ** 2).sum() / 2 + (self.vector**2).sum() / 2}


def test_steps_equal_adamw_clipping_and_ema_written_out(tmp_path):
    owner = Quadratic()
    options = settings(steps=40, weight_decay=0.1, clip_norm=0.5, ema_decay=0.5)
    weights = [owner.matrix.detach().numpy().copy(), owner.vector.detach().numpy().copy()]
    goals, decays = [1.0, 0.0], [0.1, 0.0]
    averages = [w.copy() for w in weights]
    first, second = [np.zeros_like(w) for w in weights], [np.zeros_like(w) for w in weights]
    for step in range(40):
        rate = options.learning_rate_at(step)
        gradients = [w - goal for w, goal in zip(weights, goals)]
        norm = math.sqrt(sum((g**2).sum() for g in gradients))
        share = min(1.0, 0.5 / (norm + 1e-6))
        decay = min(0.5, (1 + step) / (10 + step))
        for i, gradient in enumerate(gradients):
            gradient = gradient * share
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            move = first[i] / (1 - 0.9 ** (step + 1))
            scale = np.sqrt(second[i] / (1 - 0.999 ** (step + 1))) + 1e-8
            weights[i] = weights[i] * (1 - rate * decays[i]) - rate * move / scale
            averages[i] = decay * averages[i] + (1 - decay) * weights[i]
    run = Trainer(owner, owner.loss, TinyBatches(), options, tmp_path)
    assert run.run() is False
    assert (run.step, run.skipped) == (40, 0)
    for found, expected in zip((owner.matrix, owner.vector), weights):
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9)
    for found, expected in zip(run.ema.averages.values(), averages):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_ema_is_the_weighted_sum_of_all_weights():
    values = [float(v) for v in np.random.default_rng(0).normal(size=60)]
    parameter = torch.nn.Parameter(torch.tensor([values[0]], dtype=torch.float64))
    ema = ExponentialMovingAverage({"p": parameter}, 0.8)
    for value in values[1:]:
        parameter.data.fill_(value)
        ema.update()
    decays = [min(0.8, (1 + n) / (10 + n)) for n in range(59)]
    shares = [math.prod(decays)]
    shares += [(1 - d) * math.prod(decays[n + 1 :]) for n, d in enumerate(decays)]
    assert math.isclose(sum(shares), 1.0)
    expected = math.fsum(s * v for s, v in zip(shares, values))
    assert math.isclose(ema.averages["p"].item(), expected, rel_tol=1e-12)


def test_ema_weights_are_swapped_in_and_out(tmp_path):
    run = trainer(tmp_path)
    run.run(30)
    before, averages = everything(run), copy_averages(run)
    with pytest.raises(ZeroDivisionError), run.ema.swapped_in():
        for name, parameter in run.parameters.items():
            assert torch.equal(parameter, averages[name])
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in everything(run).items()
               if not name.startswith("history."))  # fmt: skip
    assert not torch.equal(run.parameters["trained.0.weight"], averages["trained.0.weight"])


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    options = settings(steps=110, learning_rate=2.0)
    rates = [options.learning_rate_at(step) for step in range(111)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 0.2)
    assert rates[10] == 2.0
    assert math.isclose(rates[60], 1.0)
    assert math.isclose(rates[110], 0.0, abs_tol=1e-15)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    angle = np.pi * (np.arange(10, 111) - 10) / 100
    np.testing.assert_allclose(rates[10:], 1 + np.cos(angle), atol=1e-15)


def broken_at(steps, owner, bad="loss"):
    """A loss that is not finite, or whose gradient is not, at the given steps."""
    counter = iter(range(10**6))

    def loss(batch, generator):
        good = (owner.trained(batch) ** 2).mean()
        if next(counter) not in steps:
            return {"loss": good}
        if bad == "loss":
            return {"loss": good * math.nan}
        # The root's slope at zero is infinite, its value is not.
        return {"loss": good + (owner.trained[0].weight.sum() * 0).sqrt()}

    return loss


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, bad):
    owner = Owner()
    run = trainer(tmp_path, owner=owner, loss=broken_at({3, 4}, owner, bad))
    run.run(3)
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    averages = copy_averages(run)
    run.run(5)
    assert (run.step, run.skipped) == (5, 2)
    assert all(torch.equal(p, before[name]) for name, p in run.parameters.items())
    assert all(torch.equal(a, averages[name]) for name, a in run.ema.averages.items())
    run.run(12)
    assert run.skipped == 2
    assert not torch.equal(run.parameters["trained.0.weight"], before["trained.0.weight"])
    assert trainer(tmp_path).skipped == 2


def test_twenty_in_a_row_stop_the_run_and_keep_the_weights(tmp_path):
    owner = Owner()
    run = trainer(tmp_path, owner=owner, loss=broken_at(range(6, 500), owner))
    with pytest.raises(RetrievalError, match="stopped at step 26: .* 20 steps in a row"):
        run.run()
    resumed = trainer(tmp_path)
    assert (resumed.step, resumed.skipped) == (26, 20)
    assert all(p.isfinite().all() for p in resumed.parameters.values())


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_is_raised_and_the_whole_steps_are_kept(tmp_path, error):
    class Failing(TinyBatches):
        def batch(self, step):
            if step == 6:
                raise error("no such step")
            return super().batch(step)

    with pytest.raises(error):
        trainer(tmp_path, batches=Failing()).run()
    assert trainer(tmp_path).step == 6


def test_a_half_applied_step_is_never_saved(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    run.run(6)
    update = run.ema.update
    monkeypatch.setattr(run.ema, "update", lambda: update() if run.step < 7 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.run()  # step 7 is whole and not saved yet, step 8 is half applied
    resumed, whole = trainer(tmp_path), trainer(tmp_path / "whole")
    whole.run(6)
    assert resumed.step == 6
    assert all(torch.equal(p, whole.parameters[name]) for name, p in resumed.parameters.items())


def test_the_history_is_written_as_csv(tmp_path):
    run = trainer(tmp_path)
    run.run(50)
    assert set(run.history) == {"loss", "root", "grad_norm", "learning_rate"}
    assert all(len(series) == 50 for series in run.history.values())
    with open(tmp_path / "losses.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 51))
    np.testing.assert_allclose([float(r["loss"]) for r in rows], run.history["loss"], rtol=1e-8)


def test_the_plot_shows_each_loss(tmp_path):
    trainer(tmp_path).run(50)
    with Image.open(tmp_path / "losses.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(10**6)}
    assert (31, 119, 180) in colours and (255, 127, 14) in colours
    assert (44, 160, 44) not in colours  # neither gradient norm nor learning rate


@pytest.mark.filterwarnings("error")
def test_a_plot_of_one_step_and_of_none_finite(tmp_path):
    trainer(tmp_path / "one").run(1)
    owner = Owner()
    trainer(tmp_path / "none", owner=owner, loss=broken_at(range(9), owner)).run(3)
    for name in ("one", "none"):
        assert (tmp_path / name / "losses.png").stat().st_size > 0


def test_only_what_requires_a_gradient_is_trained_and_saved(tmp_path):
    run = trainer(tmp_path)
    frozen = run.owner.frozen.weight.detach().clone()
    run.run(20)
    assert torch.equal(run.owner.frozen.weight, frozen)
    assert not any(name.startswith("frozen") for name in run.ema.averages)
    with pytest.raises(RetrievalError, match="Nothing to train"):
        trainer(tmp_path / "none", owner=Owner().requires_grad_(False))


def test_no_two_steps_share_a_seed():
    assert len({seed_generator(7, step).initial_seed() for step in range(20_000)}) == 20_000


def test_seed_and_step_alone_determine_a_generator():
    def draw(seed, step):
        return torch.randn(4, generator=seed_generator(seed, step))

    assert torch.equal(draw(7, 3), draw(7, 3))
    assert not torch.equal(draw(7, 3), draw(7, 4))
    assert not torch.equal(draw(7, 3), draw(8, 3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(RetrievalError, match=f"training setting {name} is .*; it must be "):
        settings(**{name: value})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_precision_is_that_of_the_products_only(tmp_path, precision):
    owner, seen = Owner(), []

    def loss(batch, generator):
        seen.append(owner.frozen(batch).dtype)
        return {"loss": (owner.trained(batch) - owner.frozen(batch)).float().square().mean()}

    run = trainer(tmp_path, owner=owner, loss=loss, precision=precision)
    run.run(2)
    assert seen == [getattr(torch, precision)] * 2
    assert {t.dtype for t in everything(run).values() if t.is_floating_point()} == {
        torch.float32,
        torch.float64,  # the history
    }
