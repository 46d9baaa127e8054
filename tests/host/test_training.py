"""Train Retrieval ControlNet in the host, on a shrunken SD 1.5."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import pytest
import torch
from cached_data_set import write_pictures
from conftest import LACKING
from making import (
    TINY_SD15,
    TINY_SD21,
    FakeCLIP,
    FakeVAE,
    checkpoint,
    encoded,
    model_from,
    noise,
    same_weights,
    sample,
    weights_of,
)
from retrieval_pack.nodes.apply_reference_retrieval import RetrievalApplyReferences
from retrieval_pack.nodes.host import graph_base, network_training
from retrieval_pack.nodes.host.apply import apply_references
from retrieval_pack.nodes.host.encoded_references import References
from retrieval_pack.nodes.host.folders import NETWORKS
from retrieval_pack.nodes.load_retrieval_controlnet import FILE, RetrievalControlNetLoader
from retrieval_pack.nodes.train_retrieval_controlnet import CONNECTED, RetrievalTrainControlNet
from retrieval_pack.retrieval_core.bank.encoding import split_features
from retrieval_pack.retrieval_core.network.controlnet import load
from retrieval_pack.retrieval_core.sampling.noise_schedule import NoiseSchedule
from retrieval_pack.retrieval_core.training import memory_estimate, progress_sheet, training_run
from retrieval_pack.retrieval_core.training.memory_estimate import check_memory
from retrieval_pack.retrieval_core.training.paper_objective import seed_generator
from serving import messages
from test_architectures import NARROW_SDXL
from test_datasets import draw_pictures

pytestmark = pytest.mark.skipif(bool(LACKING), reason="see the line at the end of the tests")
ROWS = [("ann", "bob", 0, True, True)] * 4 + [("cid", "bob", 0, True, False)] * 4


class Clip(FakeCLIP):
    """Knows the options that training gives."""

    def tokenize(self, text: str, disable_weights: bool = False) -> str:
        assert disable_weights
        return text


class Vae(FakeVAE):
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pictures = torch.nn.functional.interpolate(latents[:, :3], scale_factor=8.0)
        return (pictures / 8).clamp(0, 1).movedim(1, -1)


@pytest.fixture
def place(monkeypatch, tmp_path):
    """The host's folders of data sets, networks and temporary files, with a data set in it."""
    for kind in ("datasets", NETWORKS):
        paths = ([str(tmp_path / kind)], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, paths)
    folder_paths.filename_list_cache.pop(NETWORKS, None)
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    write_data(tmp_path)
    yield tmp_path
    folder_paths.filename_list_cache.pop(NETWORKS, None)
    management.interrupt_current_processing(False)


def write_data(place: Path, rows=ROWS) -> None:
    (place / "datasets").mkdir(exist_ok=True)
    write_pictures(place / "datasets", rows)


def train(model=None, vae=None, clip=None, name="mine", **changes):
    settings = {
        "task": "same character",
        "trained": "encoder and decoder",
        "steps": 4,
        "learning_rate": 1e-3,
        "rank": 0,
        "resolution": 64,
        "batch_size": 2,
        "seed": 0,
        "references": 2,
        "sheet_every": 0,
        **changes,
    }
    model = model_from(checkpoint(TINY_SD15)) if model is None else model
    return RetrievalTrainControlNet.execute(
        model, vae or Vae(), clip or Clip(), "set", name, **settings
    )


def refused(call, *arguments, **named) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments, **named)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and ". " not in message, message
    return message


def test_the_loss_falls_and_the_network_is_the_one_in_the_file(place, monkeypatch):
    # One timestep and one noise, so that the loss is comparable between steps.
    fixed = training_run.draw_noise
    monkeypatch.setattr(
        training_run,
        "draw_noise",
        lambda seed, numbers, *rest: fixed(seed, torch.zeros_like(numbers), *rest),
    )
    model = model_from(checkpoint(TINY_SD15))
    before = weights_of(model)
    made = train(model, steps=16, batch_size=4, sheet_every=16)
    net, loss_map, steps, file = made.args
    losses = loss_map["loss"]
    assert steps == len(losses) == 16 and all(type(loss) is float for loss in losses)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4]), losses
    assert same_weights(model, before)
    assert file == "mine_00001_.safetensors" and len(made.ui["images"]) == 1
    (report,) = made.ui["text"]
    assert report.startswith("Training on 8 pictures of 2 characters") and file in report
    (loaded,) = RetrievalControlNetLoader.execute(model, {"network": FILE, "file": file}).args
    other = load(place / NETWORKS / file)
    assert loaded.maker.fingerprint == net.maker.fingerprint
    assert other.card.training["steps_done"] == 16 and other.decoder
    pictures = []
    for network in (net, loaded):
        references = encoded(network)
        (patched,) = RetrievalApplyReferences.execute(
            model, references, 1.0, 0.0, 1.0, "recommended"
        ).args
        pictures.append(sample(patched))
    assert torch.equal(*pictures)
    assert not torch.equal(pictures[0], sample(model))
    assert not list((place / "datasets" / ".cache" / "runs").iterdir())


def test_the_file_gives_the_trainers_own_samplers_pictures(place, monkeypatch):
    """The trainer samples in float32 and the file is float16, decoder included."""
    seen = {}

    def draw(self, objective, step):
        batch = self.batch.to("cpu", torch.float32)
        latents = progress_sheet.sample_batch(objective, batch, self.empty, self.config.seed)
        seen.update(batch=batch, empty=self.empty[0].float(), latents=latents)
        return place / "sheet.png", {}

    monkeypatch.setattr(progress_sheet.ProgressSheet, "draw", draw)
    monkeypatch.setattr(network_training.HostWatcher, "show_sheet", lambda self, path: None)
    model = model_from(checkpoint(TINY_SD15))
    net, *_ = train(model, steps=20, learning_rate=3e-3, sheet_every=20).args
    batch, latents = seen["batch"], seen["latents"]

    def apply(reference_latents):
        references = []
        for latent, context, mask in zip(
            reference_latents, batch.reference_context[0], batch.reference_masks[0]
        ):
            features = net.encode(latent[None], context[None], None, 64)
            references += split_features(features, latent.shape[1:], [mask])
        return apply_references(model, References(net, tuple(references)), 1.0)

    patched, others = (apply(t) for t in (batch.reference_latents[0], -batch.reference_latents[0]))
    schedule = NoiseSchedule()
    sigmas = torch.cat([schedule.sigmas()[schedule.timesteps(20)], torch.zeros(1)]).float()
    drawn = torch.randn(latents.shape[1:], generator=seed_generator(0, 0))[None]
    found, plain, other = (
        comfy.sample.sample_custom(
            one,
            drawn,
            5.0,
            comfy.samplers.sampler_object("dpmpp_2m"),
            sigmas,
            [[batch.context[:1], {}]],
            [[seen["empty"][None], {}]],
            torch.zeros_like(drawn),
            disable_pbar=True,
        )
        for one in (patched, model, others)
    )
    # The host samples unscaled latents: `sample_custom` takes and gives the VAE's.
    wanted = latents[:1] / 0.18215
    effect, error, swapped = (
        float((t - wanted).square().mean().sqrt()) for t in (plain, found, other)
    )
    print(f"error {error:.2e}; no references {effect:.2e}, others {swapped:.2e}")
    assert error < 0.02 * min(effect, swapped)


@pytest.mark.parametrize(
    ("base", "config", "clip"),
    [
        ("sd15", replace(TINY_SD15, in_channels=9), Clip()),
        ("sd21", TINY_SD21, Clip(1024)),
        ("sdxl", replace(NARROW_SDXL, middle_depth=1), Clip(2048, pooled=1280)),
    ],
)
def test_inpainting_sd2_and_sdxl_are_trained(place, base, config, clip):
    model = model_from(checkpoint(config))
    net, loss_map, *_ = train(model, clip=clip, trained="nothing else", steps=2).args
    assert net.base == base and net.config == config and not net.network.decoder
    assert any(bool(site.zero_conv.weight.any()) for site in net.network.retrieval.values())
    assert loss_map["loss"][0] > 0


def test_a_second_training_does_not_overwrite_the_first(place):
    model = model_from(checkpoint(TINY_SD15))
    first = train(model, trained="nothing else", name="group/mine").args[3]
    content = (place / NETWORKS / first).read_bytes()
    second = train(model, trained="nothing else", name="group/mine", seed=1).args[3]
    assert (first, second) == ("group/mine_00001_.safetensors", "group/mine_00002_.safetensors")
    assert (place / NETWORKS / first).read_bytes() == content
    assert (place / NETWORKS / second).read_bytes() != content


@pytest.mark.parametrize("raised_by_the_bar", [False, True])
def test_an_interruption_saves_the_work_and_the_next_run_goes_on(
    place, monkeypatch, raised_by_the_bar
):
    model, settings = model_from(checkpoint(TINY_SD15)), {"rank": 2, "steps": 6}
    whole = train(model, name="whole", **settings).args
    moved = []

    def update(self, value, total=None, preview=None, **_):
        moved.append(value)
        if moved.count(3) == 1 and value == 3:
            management.interrupt_current_processing()
            if raised_by_the_bar:  # the host's hook does
                management.throw_exception_if_processing_interrupted()

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", update)
    with pytest.raises(management.InterruptProcessingException):
        train(model, **settings)
    assert not management.processing_interrupted()
    part = load(place / NETWORKS / "mine_00001_.safetensors")
    assert part.card.training["steps_done"] == 4
    assert any(bool(site.zero_conv.weight.any()) for site in part.retrieval.values())
    moved.clear()
    net, loss_map, steps, file = train(model, **settings).args
    assert moved[-2:] == [5, 6] and file == "mine_00002_.safetensors" and steps == 6
    assert loss_map == whole[1]
    for name, value in load(place / NETWORKS / "whole_00001_.safetensors").state_dict().items():
        assert torch.equal(net.network.state_dict()[name], value), name


def test_an_interruption_while_a_sheet_is_drawn_waits_for_the_step(place):
    class Interrupted(Vae):
        def decode(self, latents):
            management.interrupt_current_processing()
            management.throw_exception_if_processing_interrupted()

    with pytest.raises(management.InterruptProcessingException):
        train(vae=Interrupted(), sheet_every=2, trained="nothing else")
    assert not management.processing_interrupted()
    part = load(place / NETWORKS / "mine_00001_.safetensors")
    assert part.card.training["steps_done"] == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 8}, ["rank 8 has no effect", "set rank to 0", "'encoder'"]),
        ({"rank": -1}, ["rank is -1"]),
        ({"trained": "lock_both"}, ["trained is 'lock_both'", "'nothing else'"]),
    ],
)
def test_what_is_trained_and_its_rank_are_refused_before_queueing(place, changes, words):
    settings = {"trained": "nothing else", "rank": 0, **changes}
    sentence = RetrievalTrainControlNet.validate_inputs(**settings)
    assert refused(train, **settings) == sentence
    assert all(word in sentence for word in words)
    # A linked value is None.
    assert RetrievalTrainControlNet.validate_inputs(None, 8) is True
    assert RetrievalTrainControlNet.validate_inputs("nothing else", None) is True


def test_sentences_name_the_nodes_settings(place, monkeypatch):
    """And recommend none that only the command line has."""
    assert "training setting resolution is 32" in refused(train, resolution=32)
    monkeypatch.setattr(memory_estimate.importlib.util, "find_spec", lambda name: True)
    none = place / "none"
    config = network_training.NodeConfig(none, none, none, size=64, batch_size=1, rank=2)
    least = replace(config, checkpoint_activations=True)
    with torch.inference_mode(False):
        some, no = (refused(check_memory, one, TINY_SD15, "sd15", 0) for one in (config, least))
    assert "save_memory = true would save most" in some
    assert "smaller resolution or base" in no


def test_a_data_set_without_identities_is_refused(place):
    shutil.rmtree(place / "datasets" / "set")
    write_data(place, [(f"c{n}", "bob", 0, True, False) for n in range(4)])
    assert "None of the 4 pictures" in refused(train)


@pytest.mark.parametrize("name", ["", "../x", "/etc/x", ".hidden", "a\nb", "a?"])
def test_names_that_leave_the_folder_are_refused(place, name):
    assert repr(name) in refused(train, name=name)
    assert not list(place.glob(f"{NETWORKS}/*"))


def test_a_loss_that_is_not_finite_stops_with_the_step_and_its_pictures(place, monkeypatch):
    fixed, calls = training_run.draw_noise, []

    def broken(*arguments):
        calls.append(arguments)
        steps, drawn = fixed(*arguments)
        return steps, drawn if len(calls) < 3 else drawn * torch.nan

    monkeypatch.setattr(training_run, "draw_noise", broken)
    message = refused(train, trained="nothing else")
    assert "step 3" in message and ".png" in message
    assert not list(place.glob(f"{NETWORKS}/*.safetensors"))


def test_models_of_another_base_or_with_patches_are_refused(place):
    assert "VAE input is empty" in refused(graph_base.make_base, tiny(), None, Clip())
    assert "CLIP input is empty" in refused(graph_base.make_base, tiny(), Vae(), None)
    assert "12 channels" in refused(train, vae=Vae(12))
    assert "width 1024" in refused(train, clip=Clip(1024))
    model = tiny()
    model.add_patches({"diffusion_model.out.2.bias": ("diff", (torch.ones(4),))}, 1.0)
    assert "1 patched weights" in refused(train, model)
    assert not list(place.glob(f"{NETWORKS}/*.safetensors"))


def tiny():
    return model_from(checkpoint(TINY_SD15))


@pytest.mark.parametrize("sampling", ["eps", "v_prediction", "lcm", "x0"])
@pytest.mark.parametrize("zsnr", [False, True])
def test_the_schedule_is_the_models(sampling, zsnr):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    (model,) = ModelSamplingDiscrete().patch(tiny(), sampling, zsnr)
    found = model.get_model_object("model_sampling")
    if sampling in ("lcm", "x0"):
        assert "sampling patches" in refused(graph_base.detect_schedule, found)
        return
    schedule = graph_base.detect_schedule(found)
    assert schedule.prediction == ("v" if sampling == "v_prediction" else "eps")
    assert schedule.zero_terminal_snr is zsnr


def test_prompts_are_the_hosts_first_77_tokens_and_brackets_no_weights(place):
    class Long(Clip):
        def encode_from_tokens(self, tokens, return_pooled=False):
            return noise(1, 154, 768, seed=sum(map(ord, tokens))), None

    prompts = graph_base.GraphPrompts(Long(), None)
    context, vector = prompts.encode(["(a)", "b"], [(64, 64)] * 2)
    assert context.shape == (2, 77, 768) and vector is None
    assert torch.equal(context[1], noise(1, 154, 768, seed=ord("b"))[0, :77])


def test_sdxl_is_told_the_size_as_encode_references_does():
    prompts = graph_base.GraphPrompts(Clip(2048, pooled=1280), 2816)
    _, vector = prompts.encode(["a"], [(512, 512)])
    pooled = noise(1, 1280, seed=ord("a"))
    expected = graph_base.make_vector_conditioning(pooled, 512, 2816)
    assert torch.equal(vector, expected)


def test_the_losses_of_a_stopped_run_are_kept(tmp_path):
    watcher = network_training.HostWatcher(tmp_path)
    with watcher.follow(0, 5):
        for step in (1, 2, 3):
            watcher.update(step, {"loss": float(step), "face": 0.0})
    again = network_training.HostWatcher(tmp_path)
    with again.follow(2, 5):  # from a checkpoint before the last step
        again.update(3, {"loss": 7.0})
    assert again.losses == [1.0, 2.0, 7.0]
    assert json.loads((tmp_path / "losses.json").read_text()) == again.losses


def make_prompt(steps: int) -> dict:
    """Builds a data set of paper dolls, trains on it for the demo model, and plots the losses."""
    made = {"source": "cast", "name": "cast", "outfits": "garments", "copy_pictures": False}
    given = {
        "model": ["demo", 0], "clip": ["demo", 1], "vae": ["demo", 2], "dataset": ["build", 0],
        "dataset_name": CONNECTED, "name": "dolls", "task": "composition", "trained": "encoder",
        "steps": steps, "learning_rate": 1e-3, "rank": 0, "resolution": 64, "batch_size": 2,
        "seed": 0, "references": 2, "sheet_every": 2,
    }  # fmt: skip
    plot = {"loss": ["train", 1], "filename_prefix": "losses"}
    return {
        "build": {"class_type": "RetrievalBuildDataset", "inputs": made},
        "demo": {"class_type": "RetrievalPaperdollModel", "inputs": {"batch_size": 1}},
        "train": {"class_type": "RetrievalTrainControlNet", "inputs": given},
        "plot": {"class_type": "LossGraphNode", "inputs": plot},
    }


def test_on_a_running_server(server):
    base = server.log.parent
    draw_pictures(base / "input" / "cast", 3)
    entry = server.run(make_prompt(3))
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])
    home = base / "models" / NETWORKS
    first = load(home / "dolls_00001_.safetensors", "paperdoll")
    assert first.card.training["steps_done"] == 3
    assert server.images(entry, "train").shape[-1] == 3
    assert server.images(entry, "plot").shape[-1] == 3

    stopped = server.queue(make_prompt(100_000))
    server.wait(lambda: list((base / "datasets" / ".cache" / "runs").glob("*/run.json")))

    def interrupt():
        server.post("/interrupt", {})
        return server.finished(stopped)

    entry = server.wait(interrupt)
    assert messages(entry, "execution_interrupted"), json.dumps(entry["status"])
    part = load(home / "dolls_00002_.safetensors", "paperdoll")
    assert 1 <= part.card.training["steps_done"] < 100_000
    assert list((base / "datasets" / ".cache" / "runs").glob("*/step-*.safetensors"))
