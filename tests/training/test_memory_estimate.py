"""The memory that a run needs, estimated from shapes."""

from pathlib import Path

import pytest
import torch
from refusal import sentence
from torch import nn
from torch.utils.checkpoint import checkpoint

from retrieval_core.network.controlnet import Card, RetrievalControlNet
from retrieval_core.network.unet import SD15, SDXL, UNet, UNetConfig
from retrieval_core.sampling.noise_schedule import NoiseSchedule
from retrieval_core.training.memory_estimate import (
    GIB,
    LiveMemory,
    check_memory,
    estimate_memory,
    imitate_autocast,
    rehearse_step,
)
from retrieval_core.training.paper_objective import PaperObjective
from retrieval_core.training.run_config import RunConfig
from retrieval_core.training.task_batches import Batch

SMALL = UNetConfig(32, (1, 2), (1, 1), (1, 1), 1, 64, num_heads=8)


def configure(**settings) -> RunConfig:
    path = Path("x")
    return RunConfig(path, path, path, **{"size": 128, "batch_size": 2, **settings})


def estimate(**settings):
    return estimate_memory(configure(**settings), SMALL, "sd15")


def objective(config, **kw):
    network = RetrievalControlNet(SMALL, Card("sd15"), **kw)
    return PaperObjective(network, UNet(SMALL, **kw), NoiseSchedule(), config)


@pytest.mark.parametrize("lock", ["train_both", "lock_decoder", "lock_both"])
def test_trained_weights_are_float32_and_frozen_matrices_are_halved(lock):
    found = estimate(lock=lock)
    parameters = list(objective(configure(lock=lock, precision="float32")).parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    matrices = sum(p.numel() for p in parameters if not p.requires_grad and p.ndim > 1)
    everything = sum(p.numel() for p in parameters)
    assert found.weights == 4 * everything - 2 * matrices
    assert found.gradients == found.average == 4 * trained
    assert found.optimizer == 8 * trained


def test_the_average_needs_no_memory_where_there_is_none():
    assert estimate(ema_decay=None).average == 0


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("size", [64, 128])
def test_the_peak_of_a_step_is_that_of_the_same_step_with_numbers(size, accumulate):
    """By torch's own profiler, which sees what the allocator does, in float32."""
    config = configure(
        size=size, batch_size=1, precision="float32", optimizer="adamw-fused", accumulate=accumulate
    )
    real = objective(config)
    before = 0
    if accumulate > 1:  # gradients of an earlier pass
        for parameter in real.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                before += parameter.grad.nbytes
    peak = profile_peak(lambda: rehearse_step(real, config))
    estimated = estimate_memory(config, SMALL, "sd15")
    found = estimated.gradients + estimated.activations
    assert abs(found / (before + peak) - 1) < 0.1, (found, before, peak)


def profile_peak(work):
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


ADDED = {"correspondence": 0.2, "reconstruction": 0.3, "part_weight": 1.0}


@pytest.mark.parametrize("added", [{"reconstruction": 0.3}, ADDED])
def test_the_terms_that_settings_add_are_counted(added):
    """Against the objective itself, with numbers."""
    config = configure(
        precision="float32", optimizer="adamw-fused", batch_size=1, targets=2, token_budget=16,
        size=256, **added,
    )  # fmt: skip
    real, batch = objective(config), make_batch(config)
    noise = torch.zeros(len(batch.latents), dtype=torch.long), torch.randn_like(batch.latents)
    peak = profile_peak(lambda: real(batch, *noise)["loss"].backward())
    estimated = estimate_memory(config, SMALL, "sd15")
    found = estimated.gradients + estimated.activations
    assert abs(found / peak - 1) < 0.1, (found, peak)


def make_batch(config):
    edge, count, references = config.size // 8, config.batch_size, config.references
    targets = count * config.targets
    parts = torch.randint(0, 16, (targets, 2 * edge, 2 * edge), dtype=torch.uint8)
    return Batch(
        latents=torch.randn(targets, 4, edge, edge),
        content=torch.ones(targets, 1, edge, edge),
        face=torch.zeros(targets, 1, edge, edge),
        context=torch.randn(targets, 77, 64),
        y=None,
        reference_latents=torch.randn(count, references, 4, edge, edge),
        reference_context=torch.randn(count, references, 77, 64),
        reference_y=None,
        reference_masks=torch.ones(count, references, edge, edge, dtype=torch.bool),
        used=torch.ones(count, references, dtype=torch.bool),
        parts=parts,
        reference_parts=parts[:count, None].expand(-1, references, -1, -1),
        numbers=torch.arange(targets),
        names=[[]] * count,
    )


def test_recomputed_activations_save_memory():
    assert estimate(checkpoint_activations=True).activations < 0.7 * estimate().activations


def test_activations_grow_with_the_batch_and_halve_with_the_precision():
    one, two = (estimate(batch_size=n, accumulate=2).activations for n in (1, 2))
    assert 1.7 < two / one < 2.1
    whole = estimate(precision="float32", accumulate=2).activations
    assert 0.5 < two / whole < 0.95


def test_a_locked_encoder_stores_nothing_of_itself():
    assert estimate(lock="lock_both").activations < 0.8 * estimate().activations


def test_low_rank_training_needs_little_state():
    found, full = estimate(rank=4), estimate()
    assert found.optimizer < 0.5 * full.optimizer and found.weights < full.weights


# The parts


def test_live_memory_counts_storages_while_they_are_alive():
    known = torch.zeros(100)
    with LiveMemory([known]) as memory:
        view = known[:50]
        first = view + 1
        second = torch.cat([first, first])
        assert memory.alive == 4 * 150
        del first
        third = second.view(10, 10).add_(1)
        assert memory.alive == 4 * 100 and third.shape == (10, 10)
    assert memory.peak == 4 * 150


@pytest.mark.parametrize("recomputed", [False, True])
def test_layers_have_the_types_that_cudas_autocast_chooses(recomputed):
    layers = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.SiLU())
    imitate_autocast(layers, torch.bfloat16)
    seen = []
    for layer in layers[:3]:
        layer.register_forward_hook(lambda layer, given, made: seen.append(made.dtype))
    x = torch.ones(2, 32, requires_grad=True)
    y = checkpoint(layers, x, use_reentrant=False) if recomputed else layers(x)
    y.sum().backward()
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16] * (2 if recomputed else 1)
    assert layers[0].weight.grad.dtype == x.grad.dtype == torch.float32


# Refusals, and the cards that the pack names


def test_what_fits_is_described():
    line = check_memory(configure(), SMALL, "sd15", 4 * GIB)
    assert line.startswith("Memory on the device: 1.") and "gradients 0.0" in line


def test_what_cannot_fit_names_the_setting_that_saves_most():
    config = configure(size=512, batch_size=8)
    needed = estimate_memory(config, SMALL, "sd15").device
    words = sentence(check_memory, config, SMALL, "sd15", needed // 2)
    assert "batch_size = 1 with accumulate = 8 would save most" in words
    least = configure(batch_size=1, checkpoint_activations=True, lock="lock_both")
    words = sentence(check_memory, least, SMALL, "sd15", GIB // 2)
    assert "use a larger device" in words


def test_processes_share_the_optimisers_state():
    alone, four = (estimate_memory(configure(), SMALL, "sd15", world) for world in (1, 4))
    assert four.optimizer == alone.optimizer // 4
    assert alone.device - four.device == alone.optimizer - four.optimizer


CARDS = {
    "lock_decoder, 12 GB": (SD15, "sd15", 12, {"lock": "lock_decoder", "size": 512}),
    "train_both, 24 GB": (SD15, "sd15", 24, {"lock": "train_both", "size": 512}),
    "low rank, 24 GB": (SDXL, "sdxl", 24, {"rank": 16, "size": 1024}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_the_settings_that_the_pack_names_fit_their_cards(name):
    shape, base, gigabytes, settings = CARDS[name]
    config = configure(
        batch_size=1, checkpoint_activations=True, optimizer="adamw-fused", **settings
    )
    assert estimate_memory(config, shape, base).device < gigabytes * 10**9
