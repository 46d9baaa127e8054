"""The critic: its loss against a plain formulation, what does not count, where gradients go."""

from __future__ import annotations

import pytest
import torch
from refusal import sentence

from retrieval_core.files import save_safetensors
from retrieval_core.paperdoll.batches import (
    READ_SIZES,
    CriticBatches,
    render_characters,
    stack_images,
)
from retrieval_core.paperdoll.bundle import BASE_FILE, find_bundled, load_bundle
from retrieval_core.paperdoll.critic import NOISE, Critic, blur_undecided
from retrieval_core.paperdoll.model import load_base
from retrieval_core.paperdoll.train import (
    CriticTraining,
    PaperdollRetrieval,
    RetrievalOptions,
    load_critic,
    make_critic,
)

CHANNELS, SIZE, ROWS = 6, 8, 5
SIZES = {"hair": (1, 4), "upper": (2, 3), "colour": (2, 5)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def critic():
    torch.manual_seed(0)
    return Critic(CHANNELS, SIZE, SIZES).eval().requires_grad_(False)


def example():
    latents = torch.randn(ROWS, CHANNELS, SIZE, SIZE, generator=seeded(1))
    values = torch.tensor([[0, 2, 4], [3, 0, 0], [1, 1, 1], [2, 2, 3], [0, 0, 2]])
    return latents, values


def plain(critic, latents, values, found, generator):
    """Row by row and attribute by attribute, from probabilities."""
    level = NOISE * torch.rand(ROWS, 1, 1, 1, generator=generator)
    noised = latents + level * torch.randn(latents.shape, generator=generator)
    means = []
    for attribute, (part, _) in enumerate(SIZES.values()):
        costs = []
        for row in range(ROWS):
            if found is None or found[row, part]:
                shares = critic(noised[row : row + 1])[attribute][0].softmax(-1)
                costs.append(-shares[values[row, attribute]].log())
        means.append(sum(costs) / len(costs) if costs else torch.tensor(0.0))
    return sum(means) / len(means)


def test_the_loss_is_the_plain_one(critic):
    latents, values = example()
    for found in (None, torch.rand(ROWS, 3, generator=seeded(2)) < 0.6):
        ours = critic.loss(latents, values, seeded(3), found)
        torch.testing.assert_close(ours, plain(critic, latents, values, found, seeded(3)))


def test_what_the_references_do_not_show_does_not_count(critic):
    latents, values = example()
    found = torch.ones(ROWS, 3).bool()
    found[:, 2] = False
    other = values.clone()
    other[:, 1:] = 0
    assert torch.equal(
        critic.loss(latents, values, seeded(), found), critic.loss(latents, other, seeded(), found)
    )
    other[:, 0] = (values[:, 0] + 1) % 4
    assert not torch.equal(
        critic.loss(latents, values, seeded(), found), critic.loss(latents, other, seeded(), found)
    )
    nothing = torch.zeros(ROWS, 3).bool()
    assert critic.loss(latents, values, seeded(), nothing) == 0


def test_the_gradient_reaches_what_is_drawn(critic):
    latents, values = example()
    latents.requires_grad_()
    critic.loss(latents, values, seeded()).backward()
    assert latents.grad.flatten(1).abs().amax(1).gt(0).all()
    assert all(parameter.grad is None for parameter in critic.parameters())


def test_undecided_latents_lie_between_and_are_repeatable():
    a, b = torch.full((64, 2, 8, 8), 2.0), torch.full((64, 2, 8, 8), 1.0)
    found = blur_undecided(a, b, seeded())
    assert torch.equal(found, blur_undecided(a, b, seeded()))
    assert found.min() > 0.5 * 1.4 - 1e-5 and found.max() <= 2 + 1e-5
    assert found.flatten(1).std(1).max() < 1e-5  # flat pictures stay flat, also at their edges
    assert found[:, 0, 0, 0].unique().numel() > 32


def test_it_learns_to_read_the_worlds_latents():
    base = load_base(find_bundled(BASE_FILE))
    batches = CriticBatches(render_characters(0, 12), 48, 0)
    torch.manual_seed(0)
    owner = CriticTraining(base)
    optimizer = torch.optim.AdamW(owner.parameters(), 2e-3)
    losses = []
    for step in range(12):
        loss = owner.batch_loss(batches.batch(step), seeded(step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_frozen_models_follow_training_to_another_device_and_are_not_trained():
    bundle = load_bundle()
    critic = make_critic(bundle.base).requires_grad_(False)
    owner = PaperdollRetrieval(bundle.base, bundle.network, RetrievalOptions(), critic).to("meta")
    frozen = [*owner.critic.parameters(), *owner.text.parameters(), *owner.vae.buffers()]
    assert frozen and all(tensor.device.type == "meta" for tensor in frozen)
    assert not any(parameter.requires_grad for parameter in frozen)


def test_pairs_are_of_one_character_and_its_truth():
    characters = render_characters(0, 3)
    images, others, values = CriticBatches(characters, 16, 0).batch(5)
    again = CriticBatches(characters, 16, 0).batch(5)
    assert torch.equal(images, again[0]) and torch.equal(values, again[2])
    assert values.shape == (16, len(READ_SIZES))
    known = torch.stack([stack_images(renderings) for renderings in characters])
    for image, other in zip(images, others):
        places = [
            (known - picture).abs().amax((2, 3, 4)).eq(0).nonzero() for picture in (image, other)
        ]
        assert {int(p[0]) for p in places[0]} & {int(p[0]) for p in places[1]}


def test_a_file_that_is_no_critic_is_refused(tmp_path):
    path = tmp_path / "critic.safetensors"
    save_safetensors(path, {"a": torch.zeros(1)}, {"format": "another"})
    base = load_base(find_bundled(BASE_FILE))
    assert "run the stage 'critic'" in sentence(load_critic, path, base)
    assert "critic" in sentence(load_critic, tmp_path / "none.safetensors", base)
