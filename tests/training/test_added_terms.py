"""The terms beside equation 1: parts, correspondence and reconstruction; rates of copied layers."""

from dataclasses import replace

import pytest
import torch
from tiny_objective import make, make_batch, normal
from tiny_run import TinyBase

from retrieval_core.training.correspondence import UNKNOWN, average_parts
from retrieval_core.training.paper_objective import draw_noise
from retrieval_core.training.training_run import (
    make_optimizer,
    order_parameters,
    set_learning_rate,
)


def label(batch, unknown=()):
    """Label 1 on the upper half, 2 on the lower but for its last quarter; `unknown`: targets."""
    parts = torch.zeros(len(batch.latents), 16, 16, dtype=torch.uint8)
    parts[:, :8], parts[:, 8:12] = 1, 2
    shown = parts[0].expand(*batch.used.shape, 16, 16).clone()
    parts[list(unknown)] = UNKNOWN
    return replace(batch, parts=parts, reference_parts=shown)


def measure(objective, batch):
    return objective(batch, *draw_noise(3, batch.numbers, (4, 8, 8), 1000, 0.0))


def test_each_part_counts_alike_whatever_its_size():
    labels = torch.zeros(2, 8, 8, dtype=torch.uint8)
    labels[0, :, :6], labels[0, :2, 6:] = 1, 4  # in latent pixels 12 and 1
    labels[1] = 4
    squares = torch.full((2, 3, 4, 4), 100.0)
    squares[0, :, :, :3], squares[0, :, 0, 3] = 2.0, 5.0
    squares[1] = 9.0
    torch.testing.assert_close(average_parts(squares, labels), torch.tensor((2.0 + 5.0 + 9.0) / 3))
    labels[1] = UNKNOWN
    torch.testing.assert_close(average_parts(squares, labels), torch.tensor((2.0 + 5.0) / 2))
    assert average_parts(squares, torch.zeros_like(labels)) == 0


@pytest.mark.parametrize("name", ["part_weight", "correspondence", "reconstruction"])
def test_a_term_adds_its_weight_times_its_value(tmp_path, name):
    batch = label(make_batch())
    plain = measure(make(tmp_path), batch)
    losses = measure(make(tmp_path, **{name: 0.7}), batch)
    added = losses["loss"] - plain["loss"]
    torch.testing.assert_close(added, 0.7 * losses[name.replace("part_weight", "parts")])
    assert float(added.detach()) > 0.01


@pytest.mark.parametrize("name", ["part_weight", "correspondence", "reconstruction"])
def test_targets_without_part_labels_teach_nothing(tmp_path, name):
    objective = make(tmp_path, **{name: 1.0})
    batch = label(make_batch(), unknown=(0, 1))
    assert measure(objective, batch)[name.replace("part_weight", "parts")] == 0


def test_the_reconstruction_is_of_the_clean_targets_features_on_the_figure(tmp_path):
    """Written out in float64 for each position, without pooled queries."""
    objective = make(tmp_path, reconstruction=1.0, query_pooling=1, token_budget=None).double()
    batch = label(make_batch()).to("cpu", torch.float64)
    timesteps, noise = draw_noise(3, batch.numbers, (4, 8, 8), 1000, 0.0)
    found = objective(batch, timesteps, noise.double())["reconstruction"]
    noised = objective.schedule.noised(batch.latents, noise.double(), timesteps)
    _, features = objective.encode(noised, timesteps, batch.context, None)
    _, clean = objective.encode(batch.latents, 0 * timesteps, batch.context, None)
    bank, errors = objective.make_bank(batch), []
    for i, (name, site) in enumerate(objective.network.retrieval.items()):
        keys, values, bias = (getattr(bank.sites[name], k) for k in ("keys", "values", "bias"))
        size, total, weight = features[i].shape[2], 0.0, 0.0
        for row in range(2):
            for y in range(size * 3 // 4):  # the figure
                for x in range(size):
                    q = site.to_q(site.norm_query(features[i][row, :, y, x]))
                    q, k, v = (
                        t.unflatten(-1, (site.heads, -1)) for t in (q, keys[row], values[row])
                    )
                    logits = torch.einsum("hd,nhd->hn", q, k) / q.shape[1] ** 0.5 + bias[row]
                    r = torch.einsum("hn,nhd->hd", logits.softmax(-1), v).flatten()
                    wanted = clean[i][row, :, y, x]
                    wanted = (wanted - wanted.mean()) / (wanted.var(correction=0) + 1e-5).sqrt()
                    total += (objective.reader.heads[name](r) - wanted).square().mean()
                    weight += 1
        errors.append(total / weight)
    torch.testing.assert_close(found.double(), torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)


def test_the_reconstruction_trains_attention_values_and_encoder_but_no_decoder(tmp_path):
    objective = make(tmp_path, reconstruction=1.0)
    batch = label(make_batch())
    timesteps, noise = draw_noise(3, batch.numbers, (4, 8, 8), 1000, 0.0)
    one = objective(batch, timesteps, noise)
    objective.zero_grad()
    objective.config.__dict__["reconstruction"] = 2.0
    (objective(batch, timesteps, noise)["loss"] - one["loss"]).backward()
    moved = {
        n
        for n, p in objective.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 1e-7
    }
    assert {f"network.retrieval.input_1.{n}.weight" for n in ("to_q", "to_k", "to_v")} <= moved
    assert "network.encoder.input_blocks.0.0.weight" in moved
    assert not any(n.startswith("unet.") for n in moved)


def test_a_reader_is_trained_along_and_not_in_the_file(tmp_path):
    objective = make(tmp_path, reconstruction=1.0)
    trained = {n: p.detach() for n, p in order_parameters(objective).items()}
    assert any(n.startswith("reader.") for n in trained)
    assert not any("reader" in n for n in objective.finish(trained).state_dict())


def test_a_power_below_one_draws_more_high_noise():
    steps, _ = draw_noise(0, torch.arange(4000), (1, 1, 1), 1000, 0.0, 0.5)
    assert abs(float(steps.float().mean()) - 1000 / 1.5) < 15 and int(steps.max()) < 1000


def test_copied_layers_have_their_own_learning_rate(tmp_path):
    objective = make(tmp_path, copied_rate=0.25, learning_rate=0.01, warmup_steps=0)
    parameters = order_parameters(objective)
    optimizer = make_optimizer(parameters, objective.config, 1)
    set_learning_rate(optimizer, objective.config, 0)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in parameters.items():
        copied = name.startswith(("network.encoder.", "unet."))
        assert rates[id(parameter)] == (0.0025 if copied else 0.01), name
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == list(
        map(id, parameters.values())
    )


def test_items_of_several_targets_share_one_bank(tmp_path):
    """Rows are those of a batch in which each target has the references to itself."""
    objective = make(tmp_path)
    shared = replace(make_batch(2), latents=normal(6, 4, 8, 8), context=normal(6, 4, 8, seed=1))
    names = ("reference_latents", "reference_context", "reference_masks", "used")
    apart = {name: getattr(shared, name).repeat_interleave(3, 0) for name in names}
    timesteps = torch.tensor([5, 500, 900, 40, 600, 990])
    rows = [
        objective.predict(b.latents, timesteps, b.context, None, objective.make_bank(b))
        for b in (shared, replace(shared, **apart))
    ]
    torch.testing.assert_close(*rows)


def test_channel_weights_of_the_base_weigh_its_errors(tmp_path):
    base = TinyBase()
    base.channel_weights = torch.tensor([0.0, 0.0, 0.0, 4.0])
    batch = label(replace(make_batch(), content=torch.ones(2, 1, 8, 8)))
    objective = make(tmp_path, base, part_weight=1.0, face_weight=0.0)
    timesteps, noise = draw_noise(3, batch.numbers, (4, 8, 8), 1000, 0.0)
    found = objective(batch, timesteps, noise)
    noised = objective.schedule.noised(batch.latents, noise, timesteps)
    bank = objective.make_bank(batch)
    error = objective.predict(noised, timesteps, batch.context, None, bank)[:, 3] - noise[:, 3]
    torch.testing.assert_close(found["content"], error.square().mean())
    parts = error[:, :4].square().mean((1, 2)) + error[:, 4:6].square().mean((1, 2))
    torch.testing.assert_close(found["parts"], parts.mean() / 2)
