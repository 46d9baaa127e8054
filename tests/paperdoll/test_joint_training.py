"""A training step of the retrieval network: what it trains, what it computes, what cannot leak."""

import copy
import math

import numpy as np
import pytest
import torch
from refusal import sentence

from retrieval_core.bank.encoding import encode_references
from retrieval_core.bank.site_bank import make_network_bank
from retrieval_core.bank.tokens import join_references
from retrieval_core.data import Sample, cut_reference
from retrieval_core.data.prepare import prepare
from retrieval_core.network.controlnet import Card, RetrievalControlNet, load
from retrieval_core.network.unet import UNet, UNetConfig
from retrieval_core.paperdoll import pairs
from retrieval_core.paperdoll.retrieval_training import TrainableRetrieval
from retrieval_core.paperdoll.trainer import Trainer
from retrieval_core.paperdoll.training_settings import TrainingSettings
from retrieval_core.sampling.applications import Applications, Retrieval
from retrieval_core.sampling.frozen_site import freeze_sites
from retrieval_core.sampling.noise_schedule import NoiseSchedule
from retrieval_core.training.objective import resize_mask, retrieval_loss
from retrieval_core.training.settings import LOCKS

CONFIG = UNetConfig(32, (1, 2), (1, 1), (0, 1), 1, 16, num_head_channels=16)
GROUPS, TARGETS, REFERENCES, SIZE = 2, 3, 2, 8
TRAINED = {
    "train_both": {"network.encoder", "network.retrieval", "unet.output_blocks", "unet.out"},
    "lock_decoder": {"network.encoder", "network.retrieval"},
    "lock_both": {"network.retrieval"},
}


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.2 if parameter.ndim > 1 else 0.1))
    return module


def base_model():
    return randomised(UNet(CONFIG)).double()


def trainee(lock="train_both", fresh=False, **options):
    """With all weights at random, so that everything matters, or as training starts (`fresh`)."""
    unet = base_model()
    if fresh:
        network = RetrievalControlNet.from_base(unet.state_dict(), "paperdoll", config=CONFIG)
    else:
        network = randomised(RetrievalControlNet(CONFIG, Card("paperdoll")), 1)
    schedule = NoiseSchedule(prediction="v")
    return TrainableRetrieval(network.double(), unet, schedule, lock, **options)


class Batch:
    """Targets, their text, references and masks for `GROUPS` banks."""

    def __init__(self, seed=0):
        rows, count = GROUPS * TARGETS, GROUPS * REFERENCES
        self.latents = rand(rows, 4, SIZE, SIZE, seed=seed)
        self.context = rand(rows, 3, 16, seed=seed + 1)
        self.references = rand(count, 4, SIZE, SIZE, seed=seed + 2)
        self.reference_context = rand(count, 3, 16, seed=seed + 3)
        self.used = torch.ones(GROUPS, REFERENCES).bool()
        self.masks = torch.zeros(count, 4 * SIZE, 4 * SIZE).bool()
        self.masks[0, :16, :] = True
        self.masks[1, 5:30, 9:10] = True
        self.masks[2:] = True
        self.content = torch.ones(rows, 4 * SIZE, 4 * SIZE)
        self.content[:, :, 25:] = 0
        self.face = torch.zeros(rows, 4 * SIZE, 4 * SIZE)
        self.face[1:, 4:13, 6:18] = 1  # the first row shows no face

    def bank(self, model):
        return model.bank(self.references, self.reference_context, self.used, self.masks)

    def loss(self, model, seed=0, bank=None, **more):
        generator = torch.Generator().manual_seed(seed)
        bank = bank or self.bank(model)
        return model.loss(
            bank, self.latents, self.context, generator, self.content, self.face, **more
        )


def sampling_hook(network, bank):
    """Adds what sampling adds to every row at strength 1."""
    retrieval = Retrieval(bank, guidance="both", sites=freeze_sites(network))
    return Applications([retrieval]).hooks([0], 0.5)["skip_hook"]


def copies(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before):
    return {n for n, v in module.state_dict().items() if not torch.equal(v, before[n])}


def steps(model, count, rate=1e-2, batch=None, seed=None):
    """Plain AdamW steps on one batch; the losses. seed: the same noise in every step."""
    batch = batch or Batch()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(wanted, rate, weight_decay=0.0), []
    for step in range(count):
        optimizer.zero_grad()
        loss = batch.loss(model, step if seed is None else seed)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# What is trained


def part(name):
    return ".".join(name.split(".")[:2])


@pytest.mark.parametrize("lock", LOCKS)
def test_each_lock_trains_its_parts_and_all_of_them(lock):
    model = trainee(lock)
    wanted = {part(name) for name, p in model.named_parameters() if p.requires_grad}
    assert wanted == TRAINED[lock]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (part(name) in wanted), name
    before = copies(model)
    losses = steps(model, 2)
    assert all(math.isfinite(loss) for loss in losses)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed(model, before) == trained


@pytest.mark.parametrize("lock", LOCKS)
def test_the_base_encoder_and_the_base_given_never_change(lock):
    unet = base_model()
    network = randomised(RetrievalControlNet(CONFIG, Card("paperdoll")), 1).double()
    model = TrainableRetrieval(network, unet, NoiseSchedule(), lock)
    before = copies(unet)
    steps(model, 2)
    assert changed(unet, before) == set()
    assert all(p.requires_grad and p.grad is None for p in unet.parameters())
    moved = changed(model.unet, before)
    assert all(name.startswith(("output_blocks.", "out.")) for name in moved)
    assert bool(moved) == (lock == "train_both")


def test_at_the_start_the_prediction_is_the_base_models():
    model, batch = trainee(fresh=True), Batch()
    with torch.no_grad():
        found = batch.loss(model)
        batch.used[:] = False
        without = batch.loss(model)
    assert torch.equal(found["loss"], without["loss"])


# What the loss is


@pytest.mark.parametrize("face_weight", [0.0, 2.5])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_loss_is_eq_1_of_what_sampling_predicts_row_by_row(prediction, face_weight):
    model, batch = trainee(face_weight=face_weight), Batch()
    model.schedule = schedule = NoiseSchedule(prediction=prediction)
    batch.used[1, 0] = False
    with torch.no_grad():
        found = batch.loss(model, 3)
        generator = torch.Generator().manual_seed(3)
        rows = len(batch.latents)
        times = (torch.rand(rows, generator=generator) * 1000).long()
        eps = torch.randn(batch.latents.shape, generator=generator).double()
        total = {"content": 0.0, "face": 0.0}
        for row in range(rows):
            group = row // TARGETS
            chosen = [
                i for i in range(group * REFERENCES, (group + 1) * REFERENCES)
                if batch.used[group, i % REFERENCES]
            ]  # fmt: skip
            encoded = [
                encode_references(
                    model.network,
                    batch.references[i : i + 1],
                    batch.reference_context[i : i + 1],
                    masks=[batch.masks[i].float()],
                )[0]
                for i in chosen
            ]
            bank = make_network_bank(model.network, join_references(encoded))
            hook = sampling_hook(model.network, bank)
            abar = float(schedule.alphas_cumprod()[times[row]])
            x0, noise = batch.latents[row : row + 1], eps[row : row + 1]
            noised = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noise
            target = noise
            if prediction == "v":
                target = math.sqrt(abar) * noise - math.sqrt(1 - abar) * x0
            at = times[row : row + 1]
            output = model.unet(noised, at, batch.context[row : row + 1], skip_hook=hook)
            squares = (output - target)[0] ** 2
            for name, masks in (("content", batch.content), ("face", batch.face)):
                above = below = 0.0
                for y in range(SIZE):
                    for x in range(SIZE):
                        share = masks[row, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean().item()
                        above += share * squares[:, y, x].sum().item()
                        below += share * squares.shape[0]
                total[name] += above / below / rows if below else 0.0
    expected = total["content"] + face_weight * total["face"]
    assert float(found["loss"]) == pytest.approx(expected, rel=1e-9)
    assert float(found["content"]) == pytest.approx(total["content"], rel=1e-9)
    if face_weight:
        assert float(found["face"]) == pytest.approx(total["face"], rel=1e-9)


def test_the_generator_is_the_only_randomness():
    model, batch = trainee(), Batch()
    with torch.no_grad():
        torch.manual_seed(1)
        first = batch.loss(model, 5)["loss"]
        torch.manual_seed(2)
        assert torch.equal(batch.loss(model, 5)["loss"], first)
        assert not torch.equal(batch.loss(model, 6)["loss"], first)


# What cannot leak


def test_a_dropped_reference_cannot_influence_the_loss():
    model, batch = trainee(), Batch()
    batch.used[0, 1] = False
    batch.references.requires_grad_()
    batch.reference_context.requires_grad_()
    loss = batch.loss(model)["loss"]
    loss.backward()
    for gradient in (batch.references.grad, batch.reference_context.grad):
        assert not gradient[1].any()
        assert all(gradient[i].any() for i in (0, 2, 3))
    with torch.no_grad():
        loss = batch.loss(model)["loss"]
        batch.references[1] += 100
        batch.reference_context[1] -= 50
        assert torch.equal(batch.loss(model)["loss"], loss)
        batch.references[0, :, 0, 0] += 1
        assert not torch.equal(batch.loss(model)["loss"], loss)


def test_one_groups_references_cannot_influence_anothers_targets():
    model, batch = trainee(), Batch()
    batch.content[TARGETS:] = 0  # only the first group's rows count
    batch.face[TARGETS:] = 0
    batch.references.requires_grad_()
    batch.loss(model)["loss"].backward()
    assert batch.references.grad[:REFERENCES].any()
    assert not batch.references.grad[REFERENCES:].any()


def test_tokens_outside_the_mask_cannot_influence_the_loss_at_any_site():
    """Keys and values of dropped tokens: no gradient, and no change whatever they are."""
    model, batch = trainee(), Batch()
    bank = batch.bank(model)
    with torch.no_grad():
        before = batch.loss(model, bank=bank)["loss"]
    for site in bank.sites.values():
        site.keys.retain_grad()
        site.values.retain_grad()
    loss = batch.loss(model, bank=bank)["loss"]
    loss.backward()
    factors = CONFIG.site_downsampling()
    dropped_anywhere = 0
    for name, site in bank.sites.items():
        edge = SIZE // factors[name]
        pixels = 4 * factors[name]
        kept = torch.ones(GROUPS, 1 + REFERENCES * edge * edge).bool()
        for i, mask in enumerate(batch.masks):
            for token in range(edge * edge):
                y, x = divmod(token, edge)
                inside = mask[y * pixels : (y + 1) * pixels, x * pixels : (x + 1) * pixels].any()
                kept[i // REFERENCES, 1 + (i % REFERENCES) * edge * edge + token] = inside
        dropped_anywhere += int((~kept).sum())
        assert not site.keys.grad[~kept].any() and not site.values.grad[~kept].any(), name
        # The null token's value is zero and stays so; all other tokens in the bank count.
        assert site.values.grad[kept].any(-1).all(), name
        with torch.no_grad():
            site.keys[~kept] += 1000
            site.values[~kept] -= 1000
    assert dropped_anywhere > 50
    with torch.no_grad():
        assert torch.equal(batch.loss(model, bank=bank)["loss"], before)


def test_nothing_dropped_and_everything_masked_are_the_same_as_no_masks():
    model, batch = trainee(), Batch()
    batch.masks[:] = True
    with torch.no_grad():
        masked = batch.loss(model)["loss"]
        whole = model.bank(batch.references, batch.reference_context, batch.used)
        assert torch.equal(batch.loss(model, bank=whole)["loss"], masked)
        batch.masks[:] = False
        emptied = batch.loss(model)["loss"]
        batch.masks[:], batch.used[:] = True, False
        assert torch.equal(batch.loss(model)["loss"], emptied)


def test_with_all_references_dropped_nothing_is_added():
    model, batch = trainee(), Batch()
    batch.used[:] = False
    with torch.no_grad():
        dropped = batch.loss(model)["loss"]
        for site in model.network.retrieval.values():
            site.zero_conv.weight.zero_()
        assert torch.equal(batch.loss(model)["loss"], dropped)
        batch.used[:] = True
        assert torch.equal(batch.loss(model)["loss"], dropped)


def test_pixels_outside_a_filled_mask_cannot_reach_the_encoder():
    """Kept tokens see beyond the mask; that nothing leaks that way is up to the filling."""
    rng = np.random.default_rng(0)
    one = rng.integers(0, 256, (20, 16, 3), np.uint8)
    mask = np.zeros((20, 16), bool)
    mask[3:15, 4:11] = True
    two = np.where(mask[..., None], one, rng.integers(0, 256, one.shape, np.uint8))
    assert not np.array_equal(one, two)
    found = [prepare(image, mask, size=32) for image in (one, two)]
    assert torch.equal(found[0].image, found[1].image)
    assert torch.equal(found[0].mask, found[1].mask)
    for concept in ("figure", "face", "clothes"):
        cut = [
            cut_reference(Sample(image, mask, (5, 3, 10, 8)), concept, 32, remove_background=True)
            for image in (one, two)
        ]
        assert np.array_equal(cut[0].image, cut[1].image)
        assert np.array_equal(cut[0].mask, cut[1].mask)


# What comes out


def test_finished_has_the_averaged_weights_and_leaves_the_trainee_alone(tmp_path):
    model = trainee(fresh=True)
    batch = Batch()

    class Batches:
        def batch(self, step):
            return step

    trainer = Trainer(
        model,
        lambda step, generator: batch.loss(model, step),
        Batches(),
        TrainingSettings(6, learning_rate=1e-2, ema_decay=0.9, seed=1),
        tmp_path,
    )
    trainer.run()
    before = copies(model)
    averages = {n: a.clone() for n, a in trainer.ema.averages.items()}
    finished = model.finished(averages)
    assert changed(model, before) == set()
    assert all(torch.equal(a, averages[n]) for n, a in trainer.ema.averages.items())
    assert not finished.training and not any(p.requires_grad for p in finished.parameters())
    own, base = finished.state_dict(), base_model().state_dict()
    for name, value in averages.items():
        where, key = name.split(".", 1)
        if where == "network":
            assert torch.equal(own[key], value), name
        else:
            assert torch.equal(finished.decoder[key], value - base[key]), name
        assert not torch.equal(value, before[name]) or not value.any(), name
    decoder = {n for n in base if n.startswith(("output_blocks.", "out."))}
    assert set(finished.decoder) == decoder
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(finished.state_dict()[k], v) for k, v in own.items())
    # The finished network predicts what the trainee does with its averages swapped in.
    model.load_state_dict(before)
    patched = finished.apply_decoder(base_model())
    x, at, context = batch.latents, torch.tensor([500] * len(batch.latents)), batch.context
    with trainer.ema.swapped_in(), torch.no_grad():
        hook = sampling_hook(finished, batch.bank(model))
        expected = model.unet(x, at, context, skip_hook=hook)
        found = patched(x, at, context, skip_hook=hook)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    path = tmp_path / "net.safetensors"
    finished.save(path)
    loaded = load(path, "paperdoll", dtype=torch.float64)
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in finished.state_dict().items())
    assert all(torch.equal(loaded.decoder[k], v) for k, v in finished.decoder.items())
    assert loaded.decoder_is_difference


def test_a_finished_decoder_is_a_difference_though_training_went_on_from_a_whole_one():
    """A file of version 1 holds a whole decoder, which replaces the base's."""
    model = trainee()
    model.network.decoder_is_difference = False
    finished = model.finished({})
    assert finished.decoder_is_difference
    assert finished.decoder and not any(value.any() for value in finished.decoder.values())


@pytest.mark.parametrize("lock", ["lock_decoder", "lock_both"])
def test_a_locked_decoder_is_not_in_the_finished_network(lock):
    model = trainee(lock)
    before = copies(model.network)
    finished = model.finished({"network.retrieval.middle.to_q.weight": rand(64, 64, seed=3)})
    assert finished.decoder == {}
    assert changed(finished, before) == {"retrieval.middle.to_q.weight"}
    assert changed(model.network, before) == set()


@pytest.mark.parametrize("lock", LOCKS)
def test_a_few_steps_lower_the_loss(lock):
    model = trainee(lock, fresh=True)
    losses = steps(model, 12, seed=4)
    assert losses[-1] < 0.9 * losses[0], losses


def test_training_uses_the_references():
    """Trained with only the retrieval part, the loss is lower with references than without."""
    model, batch = trainee("lock_both", fresh=True), Batch()
    steps(model, 12, seed=4, batch=batch)
    with torch.no_grad():
        with_references = batch.loss(model, 4)["loss"]
        emptied = copy.copy(batch)
        emptied.used = torch.zeros(GROUPS, REFERENCES).bool()
        assert with_references < 0.9 * emptied.loss(model, 4)["loss"]


def test_a_small_noise_power_draws_more_noise_and_never_too_much():
    model = trainee(noise_power=0.5)
    seen = []
    model.schedule = NoiseSchedule(prediction="v")
    embed = model.unet.embed
    model.unet.embed = lambda steps, *rest: seen.append(steps) or embed(steps, *rest)
    for seed in range(40):
        Batch().loss(model, seed)
    steps = torch.cat(seen)
    assert steps.min() >= 0 and steps.max() <= 999
    assert steps.double().mean() == pytest.approx(1000 * 2 / 3, abs=60)  # the mean of sqrt(u)


def test_the_critic_reads_what_is_drawn_and_is_not_trained():
    """With the reader: each adds its share, and the critic's gradient reaches the decoder."""
    from retrieval_core.paperdoll.critic import Critic

    sizes = {"hair": (1, 4), "upper": (2, 3)}
    torch.manual_seed(0)
    critic = Critic(4, SIZE, sizes).double().eval().requires_grad_(False)
    batch, model = Batch(), trainee(critic=critic, critic_weight=0.7)
    rows = GROUPS * TARGETS
    parts = (
        torch.ones(rows, 4 * SIZE, 4 * SIZE).to(torch.uint8),
        torch.ones(GROUPS * REFERENCES, 4 * SIZE, 4 * SIZE).to(torch.uint8),
        3,
    )
    values = torch.zeros(rows, 2).long()
    arguments = (batch.latents, batch.context)

    def losses(attributes):
        generator = torch.Generator().manual_seed(4)
        return model.loss(
            batch.bank(model), *arguments, generator, parts=parts, attributes=attributes
        )

    ours, without = losses(values), losses(None)
    assert "drawn" not in without
    torch.testing.assert_close(ours["loss"], without["loss"] + 0.7 * ours["drawn"])
    # No reference shows part 2: the second attribute does not count, the first does.
    other = values.clone()
    other[:, 1] = 2
    assert torch.equal(losses(other)["drawn"], ours["drawn"])
    other[:, 0] = 3
    assert not torch.equal(losses(other)["drawn"], ours["drawn"])
    (ours["loss"] - without["loss"]).backward()
    assert model.unet.out[2].weight.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in model.critic.parameters())


def test_channel_weights_count_errors_by_channel():
    batch = Batch()
    weights = torch.tensor([2.0, 0.0, 0.0, 0.0])
    losses = []
    for chosen in (None, weights, 3 * weights):
        losses.append(float(batch.loss(trainee(channel_weights=chosen), 3)["content"]))
    assert losses[1] != pytest.approx(losses[0])
    assert losses[2] == pytest.approx(3 * losses[1])


# Pairs


def test_rows_are_joined_two_by_two_and_split_again():
    rows = rand(4 * 3, 2, 5, 4)
    wide = pairs.join_halves(rows, 4)
    assert wide.shape == (6, 2, 5, 8)
    assert torch.equal(wide[1], torch.cat([rows[1], rows[4]], -1))  # targets of groups 0 and 1
    assert torch.equal(wide[3], torch.cat([rows[6], rows[9]], -1))
    assert torch.equal(pairs.split_halves(wide, 4), rows)
    values = torch.arange(12)
    assert pairs.take_left(values, 4).tolist() == [0, 1, 2, 6, 7, 8]
    assert pairs.copy_left_to_right(values, 4).tolist() == [0, 1, 2] * 2 + [6, 7, 8] * 2


def test_the_loss_of_pairs_is_put_together_by_hand():
    """Both halves at one timestep by the left one's text, each with what its own bank gives."""
    model, batch = trainee(), Batch()
    with torch.no_grad():
        found = batch.loss(model, 3, paired=True)
        generator = torch.Generator().manual_seed(3)
        steps = (torch.rand(len(batch.latents), generator=generator) * 1000).long()
        steps = torch.cat([steps[:TARGETS]] * 2)
        eps = torch.randn(batch.latents.shape, generator=generator).double()
        noised = model.schedule.noised(batch.latents, eps, steps)
        target = model.schedule.target(batch.latents, eps, steps)
        banks = [
            model.bank(
                batch.references[part], batch.reference_context[part], batch.used[i : i + 1],
                batch.masks[part],
            )
            for i, part in enumerate((slice(0, REFERENCES), slice(REFERENCES, 2 * REFERENCES)))
        ]  # fmt: skip
        hooks, total = [sampling_hook(model.network, bank) for bank in banks], []

        def hook(site, h):
            halves = [own(site, half) for own, half in zip(hooks, h.chunk(2, -1))]
            return torch.cat(halves, -1)

        for t in range(TARGETS):
            left, right = t, TARGETS + t
            x = torch.cat([noised[left], noised[right]], -1)[None]
            text = batch.context[left : left + 1]
            total.append(model.unet(x, steps[left : left + 1], text, skip_hook=hook))
        lefts, rights = torch.cat(total).chunk(2, -1)
        prediction = torch.cat([lefts, rights])
        small = [resize_mask(m, (SIZE, SIZE)) for m in (batch.content, batch.face)]
        expected = retrieval_loss(prediction, target, *small, model.face_weight)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found["loss"], batch.loss(model, 3)["loss"])


def test_an_odd_number_of_characters_cannot_be_paired():
    model, batch = trainee(), Batch()
    one = model.bank(
        batch.references[:REFERENCES], batch.reference_context[:REFERENCES], batch.used[:1]
    )
    assert sentence(batch.loss, model, bank=one, paired=True).startswith("1 banks")
