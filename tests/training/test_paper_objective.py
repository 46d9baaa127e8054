"""The objective of real bases: its parts written out, its memory savers, and its file."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from refusal import sentence
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_objective import make, make_batch, normal
from tiny_run import TinyBase, set_up
from torch.overrides import TorchFunctionMode

from retrieval_core.bank.encoding import encode_references
from retrieval_core.bank.site_bank import make_network_bank
from retrieval_core.bank.token_budget import limit_tokens
from retrieval_core.bank.tokens import SiteTokens, join_references
from retrieval_core.network.controlnet import load
from retrieval_core.network.decoder_factors import expand_decoder, factorise_decoder
from retrieval_core.network.unet import UNet
from retrieval_core.sampling.applications import Retrieval
from retrieval_core.sampling.frozen_site import freeze_sites
from retrieval_core.sampling.noise_schedule import NoiseSchedule
from retrieval_core.sampling.sampler import make_guided_denoiser, sample
from retrieval_core.training.cpu_average import EVERY, CpuAverage
from retrieval_core.training.low_rank import LowRankLayer, merge_low_rank
from retrieval_core.training.objective import weigh_timesteps
from retrieval_core.training.paper_objective import draw_noise, seed_generator
from retrieval_core.training.progress_sheet import sample_batch
from retrieval_core.training.task_batches import Batch
from retrieval_core.training.training_run import make_objective, order_parameters


def run(objective, batch=None, seed=3):
    batch = batch or make_batch()
    noise = draw_noise(seed, batch.numbers, (4, 8, 8), 1000, 0.0)
    return objective(batch, *noise)["loss"]


def gradients(objective):
    objective.zero_grad()
    loss = run(objective)
    loss.backward()
    return loss, {n: p.grad for n, p in objective.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("lock", "trained"),
    [
        ("train_both", {"network.encoder", "network.retrieval", "unet.out", "unet.output_blocks"}),
        ("lock_decoder", {"network.encoder", "network.retrieval"}),
        ("lock_both", {"network.retrieval"}),
    ],
)
@pytest.mark.parametrize("rank", [None, 2])
def test_every_trained_parameter_gets_a_gradient_and_no_other(tmp_path, lock, trained, rank):
    if (lock, rank) == ("lock_both", 2):
        return  # refused by the configuration
    objective = make(tmp_path, lock=lock, rank=rank)
    _, found = gradients(objective)
    assert all(g is not None and bool(g.any()) for g in found.values())
    assert {".".join(name.split(".")[:2]) for name in found} == trained
    assert all(p.grad is None for p in objective.parameters() if not p.requires_grad)
    if rank is not None:
        low = {name.split(".")[-2] for name in found if "network.retrieval" not in name}
        assert low == {"up", "down"}


def test_recomputed_activations_give_the_same_gradients(tmp_path):
    loss, found = gradients(make(tmp_path))
    again, recomputed = gradients(make(tmp_path, checkpoint_activations=True))
    assert torch.equal(loss, again)
    assert all(torch.equal(recomputed[name], value) for name, value in found.items())


class CudaAutocast(TorchFunctionMode):
    """Autocast with CUDA's rules on the CPU, whose own are more lenient, and its refusals."""

    HALF = F.linear, F.conv2d, torch.matmul, torch.Tensor.matmul, torch.baddbmm, torch.einsum
    FLOAT = F.layer_norm, F.group_norm, F.softmax, torch.Tensor.softmax, torch.cdist

    def __torch_function__(self, func, types, args=(), kwargs=None):
        dtype = None
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.bfloat16 if func in self.HALF else None
            dtype = torch.float32 if func in self.FLOAT else dtype

        def cast(value):
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(dtype) if dtype and floating else value

        args, kwargs = [cast(a) for a in args], {n: cast(v) for n, v in (kwargs or {}).items()}
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        if func in (F.linear, F.conv2d, F.layer_norm, F.group_norm, torch.linalg.qr):
            assert len({v.dtype for v in given}) == 1, (func, [v.dtype for v in given])
        assert func is not torch.linalg.qr or given[0].dtype == torch.float32
        return func(*args, **kwargs)


def test_a_step_with_merged_tokens_obeys_the_rules_of_cudas_autocast(tmp_path):
    objective = make(tmp_path, precision="bf16", token_budget=4)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), CudaAutocast():
        loss = run(objective)
    loss.backward()
    assert torch.isfinite(loss)


def test_which_tokens_merge_does_not_depend_on_autocast():
    tokens = normal(1, 1, 32, 8)
    site = SiteTokens(tokens, None, torch.zeros(32, dtype=torch.long))
    plain = limit_tokens(site, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(limit_tokens(site, 6).tokens, plain.tokens)


def test_frozen_matrices_are_halved_and_the_rest_is_not(tmp_path):
    objective = make(tmp_path, precision="bf16", rank=2)
    for name, parameter in objective.named_parameters():
        halved = parameter.ndim > 1 and not parameter.requires_grad
        assert parameter.dtype == (torch.bfloat16 if halved else torch.float32), name
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = gradients(objective)
    whole, _ = gradients(make(tmp_path, rank=2))
    torch.testing.assert_close(loss, whole, rtol=0.02, atol=0)
    assert all(bool(g.isfinite().all()) for g in found.values())


def test_the_loss_of_a_batch_is_the_mean_of_its_rows(tmp_path):
    """Without a budget: which tokens merge depends on a batch's common directions."""
    objective = make(tmp_path, token_budget=None)
    batch = make_batch(2)
    timesteps, noise = draw_noise(3, batch.numbers, (4, 8, 8), 1000, 0.0)
    rows = []
    for i in range(2):
        values = {k: v[i : i + 1] if v is not None else None for k, v in vars(batch).items()}
        rows.append(objective(Batch(**values), timesteps[i : i + 1], noise[i : i + 1])["loss"])
    torch.testing.assert_close(objective(batch, timesteps, noise)["loss"], sum(rows) / 2)


def test_dropped_references_leave_the_bases_prediction(tmp_path):
    objective = make(tmp_path)
    batch = make_batch(used=False)
    bank = objective.make_bank(batch)
    steps = torch.tensor([10, 700])
    found = objective.predict(batch.latents, steps, batch.context, None, bank)
    expected = objective.predict(batch.latents, steps, batch.context, None, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    run(objective, batch).backward()
    assert all(bool(p.grad.isfinite().all()) for p in objective.parameters() if p.requires_grad)


def test_an_inpainting_base_fills_in_a_whole_grey_picture(tmp_path):
    base = TinyBase(in_channels=9)
    objective = make(tmp_path, base)
    seen = []
    objective.unet.input_blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    run(objective)
    assert seen[0].shape == (2, 9, 8, 8)
    assert bool((seen[0][:, 4] == 1).all()) and bool((seen[0][:, 5:] == 0).all())  # grey is 0 here


def test_noise_depends_on_the_items_number_alone():
    numbers = torch.tensor([4, 9, 2])
    steps, noise = draw_noise(7, numbers, (4, 8, 8), 1000, 0.1)
    for i, number in enumerate(numbers):
        step, row = draw_noise(7, number[None], (4, 8, 8), 1000, 0.1)
        assert torch.equal(step[0], steps[i]) and torch.equal(row[0], noise[i])
    assert not torch.equal(draw_noise(8, numbers, (4, 8, 8), 1000, 0.1)[1], noise)


def test_the_noise_offset_adds_variance_to_the_mean_of_a_channel():
    numbers = torch.arange(400)
    for offset in (0.0, 0.5):
        steps, noise = draw_noise(0, numbers, (4, 8, 8), 1000, offset)
        variance = float(noise.mean((2, 3)).var())
        assert abs(variance - (1 / 64 + offset**2)) < 0.1 * (1 / 64 + offset**2)
    assert 0 <= steps.min() and steps.max() < 1000 and abs(float(steps.float().mean()) - 500) < 60


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_min_snr_limits_the_weight_of_the_error_in_x0(prediction):
    """An error e in the prediction is e * factor in x0; its weight there is min(SNR, gamma)."""
    schedule, steps = NoiseSchedule(prediction=prediction), torch.arange(0, 1000, 37)
    found = weigh_timesteps(schedule, steps, 5.0)
    abar = schedule.alphas_cumprod()[steps]
    snr = abar / (1 - abar)
    factor = (1 - abar) / abar if prediction == "eps" else 1 - abar  # squared
    torch.testing.assert_close(found, factor * snr.clamp_max(5.0))


def test_min_snr_weighs_rows(tmp_path):
    objective = make(tmp_path, min_snr=5.0, face_weight=0.0)
    batch = make_batch()
    timesteps, noise = draw_noise(3, batch.numbers, (4, 8, 8), 1000, 0.0)
    weights = weigh_timesteps(objective.schedule, timesteps, 5.0)
    found = objective(batch, timesteps, noise)["loss"]
    noised = objective.schedule.noised(batch.latents, noise, timesteps)
    bank = objective.make_bank(batch)
    error = objective.predict(noised, timesteps, batch.context, None, bank) - noise
    rows = error[..., :6].square().mean((1, 2, 3))  # the content
    torch.testing.assert_close(found.double(), (rows * weights).mean())


def test_a_schedule_with_zero_terminal_snr_ends_in_noise_and_starts_as_it_was():
    plain, found = NoiseSchedule(), NoiseSchedule(prediction="v", zero_terminal_snr=True)
    abar = found.alphas_cumprod()
    assert float(abar[-1]) < 1e-7 and bool(found.sigmas().isfinite().all())
    assert float(abar[0]) == pytest.approx(float(plain.alphas_cumprod()[0]))
    assert bool((abar.diff() < 0).all())
    torch.testing.assert_close(  # an affine map of the square roots
        abar[:-1].sqrt().diff() / abar[:-1].sqrt().diff()[0],
        plain.alphas_cumprod()[:-1].sqrt().diff() / plain.alphas_cumprod()[:-1].sqrt().diff()[0],
    )


def test_gradients_reach_merged_tokens_by_their_shares():
    tokens = normal(1, 1, 40, 8).requires_grad_(True)
    bias = normal(1, 40, seed=1)
    site = SiteTokens(tokens, bias, torch.zeros(40, dtype=torch.long))
    merged = limit_tokens(site, 10)
    direction = normal(*merged.tokens.shape, seed=2)
    (merged.tokens * direction).sum().backward()
    # Each token moves one merged token, by its share of that one's weight.
    with torch.no_grad():
        weights = bias.exp()[0]
        jacobian = tokens.grad[0, 0]
        shares = []
        for i in range(40):
            ratios = [(jacobian[i] / d) for d in direction[0, 0]]
            j = min(range(len(ratios)), key=lambda j: float(ratios[j].std()))
            torch.testing.assert_close(ratios[j], ratios[j].mean().expand(8), rtol=1e-3, atol=1e-5)
            shares.append((j, float(ratios[j].mean())))
        for j in range(merged.tokens.shape[2]):
            members = [i for i in range(40) if shares[i][0] == j]
            total = float(weights[members].sum())
            for i in members:
                assert shares[i][1] == pytest.approx(float(weights[i]) / total, rel=1e-3)


def test_the_average_in_main_memory_is_the_weighted_sum():
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    average = CpuAverage({"p": parameter}, 0.99)
    expected, updates = 2.0, 0
    for step in range(1, 6 * EVERY + 1):
        parameter.data.fill_(float(step))
        average.update(step)
        if step % EVERY == 0:
            decay = min(0.99**EVERY, (1 + updates) / (10 + updates))
            expected, updates = decay * expected + (1 - decay) * step, updates + 1
    assert average.averages["p"].item() == pytest.approx(expected, rel=1e-6)


def test_low_rank_layers_start_as_the_layers_and_merge_into_them():
    generator = torch.Generator().manual_seed(0)
    for layer, x in (
        (torch.nn.Linear(6, 5), normal(3, 6)),
        (torch.nn.Conv2d(6, 5, 3, stride=2, padding=1), normal(2, 6, 7, 8)),
        (torch.nn.Conv2d(6, 5, 1), normal(2, 6, 7, 8)),
    ):
        plain = copy.deepcopy(layer)
        low = LowRankLayer(layer, 3, generator)
        assert torch.equal(low(x), plain(x))
        with torch.no_grad():
            low.up.weight.normal_(generator=generator)
        assert not torch.allclose(low(x), plain(x))
        merged = merge_low_rank({f"at.{k}": v for k, v in low.state_dict().items()})
        plain.load_state_dict({k.removeprefix("at."): v for k, v in merged.items()})
        torch.testing.assert_close(low(x), plain(x))


def write(objective, path, rank=None):
    trained = {n: p.detach() for n, p in order_parameters(objective).items()}
    network = objective.finish(trained)
    network.save(path, decoder_rank=rank)
    return load(path, "sd15")


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_file_gives_the_output_of_the_trainers_own_sampler(tmp_path, rank, prediction):
    """Sampled with inference's own functions, from a base that was not trained."""
    objective = make(tmp_path, TinyBase(prediction), rank=rank, token_budget=24)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad and rank is None:
                parameter.add_(0.02 * normal(*parameter.shape, seed=len(name)))
    # Whole references: masked tokens weigh nothing in a batch, but take part in random choices.
    batch = replace(make_batch(1), reference_masks=torch.ones(1, 2, 8, 8, dtype=torch.bool))
    empty = normal(4, 8, seed=9), None
    trained = sample_batch(objective, batch, empty, 4)

    base = TinyBase(prediction)
    network = write(objective, tmp_path / "net.safetensors", rank)
    latents, concepts = batch.reference_latents[0], batch.reference_context[0]
    references = encode_references(network, latents, concepts)
    bank = make_network_bank(network, join_references(references), 24)
    applied = Retrieval(bank, sites=freeze_sites(network))
    noise = torch.randn(4, 8, 8, generator=seed_generator(4, 0))[None]
    denoise = make_guided_denoiser(
        network.apply_decoder(base.unet), base.schedule, batch.context, empty[0][None], 5.0,
        [applied],
    )  # fmt: skip
    found = sample(denoise, noise, base.schedule, 20)
    scale = float(trained.std())
    assert float((found - trained).abs().max()) < 0.02 * scale
    without = sample(
        make_guided_denoiser(base.unet, base.schedule, batch.context, empty[0][None], 5.0),
        noise, base.schedule, 20,
    )  # fmt: skip
    assert float((without - trained).abs().max()) > 0.1 * scale


def test_a_low_rank_decoder_is_stored_as_products(tmp_path):
    objective = make(tmp_path, rank=2)
    whole = write(objective, tmp_path / "whole.safetensors").decoder
    factored = write(objective, tmp_path / "low.safetensors", 2).decoder
    for name, weight in whole.items():
        if name in factored:
            torch.testing.assert_close(factored[name], weight, rtol=1e-3, atol=1e-4)
        else:
            assert not bool(weight.any())
    big, small = (
        sum(
            t.numel()
            for k, t in load_file(tmp_path / f"{n}.safetensors").items()
            if "decoder." in k
        )
        for n in ("whole", "low")
    )
    assert small < 0.25 * big


def test_products_lose_what_lies_outside_their_rank():
    """The loss of a truncated decomposition, in float64."""
    decoder = {"a": normal(24, 8, 3, 3), "b": normal(30)}
    expanded = expand_decoder(factorise_decoder(decoder, 4))
    assert torch.equal(expanded["b"], decoder["b"])
    sizes = torch.linalg.svdvals(decoder["a"].double().flatten(1))
    best = float(sizes[4:].square().sum().sqrt())
    lost = float((expanded["a"] - decoder["a"]).double().norm())
    assert best * (1 - 1e-6) <= lost < 1.05 * best


def test_a_file_with_half_a_product_is_refused(tmp_path):
    path = tmp_path / "low.safetensors"
    write(make(tmp_path, rank=2), path, 2)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    tensors.pop(next(k for k in tensors if k.endswith(".down")))
    save_file(tensors, path, metadata)
    assert "unexpected" in sentence(load, path)


def test_training_leaves_the_base_unet_of_inference_as_it_was(tmp_path):
    config, base = set_up(tmp_path), TinyBase()
    before = {k: v.clone() for k, v in base.unet.state_dict().items()}
    objective = make_objective(replace(config, lock="lock_decoder"), base)
    run(objective).backward()
    assert all(torch.equal(v, before[k]) for k, v in base.unet.state_dict().items())
    assert isinstance(objective.unet, UNet)
