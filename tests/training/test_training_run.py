"""The loop of real bases on a tiny run: what it learns, resumes, refuses and leaves on the disk."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from base_files import make_checkpoint, write_checkpoint, write_tokenizer
from cached_data_set import write_pictures
from refusal import sentence
from tiny_run import TinyBase, read_checkpoint, set_up, train

from retrieval_core import files
from retrieval_core.errors import RetrievalError
from retrieval_core.network.controlnet import load
from retrieval_core.network.unet import SD15
from retrieval_core.training import training_run
from retrieval_core.training.__main__ import main

HELPERS = Path(__file__).parents[1] / "helpers"
SCRIPT = HELPERS / "tiny_run.py"


def command(folder, delay=0.0, processes=1, **changes):
    set_up(folder)
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        start += ["--master-port", str(random.randint(20000, 40000))]
    root = HELPERS.parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(HELPERS)])
    return subprocess.Popen(
        [*start, str(SCRIPT), str(folder), str(delay), json.dumps(changes)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(b[name], value), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The last checkpoint of an uninterrupted run in a process of its own."""
    folder = tmp_path_factory.mktemp("whole")
    code, _, err = finish(command(folder))
    assert code == 0, err
    return read_checkpoint(set_up(folder))


def test_the_loss_falls_when_a_few_pictures_are_learned(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        training_run.Terminal, "update", lambda self, step, losses: seen.append(losses)
    )
    # One timestep and one noise, so that the loss is comparable between steps.
    fixed = training_run.draw_noise
    monkeypatch.setattr(
        training_run,
        "draw_noise",
        lambda seed, numbers, *rest: fixed(seed, torch.zeros_like(numbers), *rest),
    )
    train(set_up(tmp_path, steps=40, learning_rate=3e-3, views=1, batch_size=6))
    first, last = (sum(losses["loss"] for losses in part) / 4 for part in (seen[:4], seen[-4:]))
    assert last < 0.6 * first, (first, last)
    assert set(seen[0]) == {"loss", "content", "face"}


def test_a_run_leaves_its_network_with_provenance_and_the_newest_checkpoints(tmp_path):
    config = set_up(tmp_path, keep_checkpoints=2, sheet_every=6, preset=("recon-9k",))
    training_run.train(config, TinyBase())
    names = sorted(str(p.relative_to(config.out)) for p in config.out.rglob("*") if p.is_file())
    assert [n for n in names if "tfevents" not in n] == [
        "run.json", "run.safetensors", "sheets/step-00000006.png", "sheets/step-00000012.png",
        "step-00000009.safetensors", "step-00000012.safetensors",
    ]  # fmt: skip
    assert any("tfevents" in name for name in names)
    network = load(config.out / "run.safetensors", "sd15")
    told = network.card.training
    assert told["base"] == TinyBase.fingerprint and told["steps"] == 12
    assert told["preset"] == ["recon-9k"] and len(told["data_set"]) == 64
    assert network.decoder and network.decoder_is_difference and network.query_pooling == 2
    assert any(bool(site.zero_conv.weight.any()) for site in network.retrieval.values())


def test_the_file_holds_the_averaged_weights(tmp_path):
    config = set_up(tmp_path, steps=20, ema_decay=0.5)
    tensors, _ = train(config)
    network = load(config.out / "run.safetensors")
    for name, value in network.state_dict().items():
        averaged = tensors.get(f"average.network.{name}")
        if averaged is not None:
            assert torch.equal(value, averaged.half()), name
    assert not torch.equal(
        tensors["average.network.retrieval.middle.to_q.weight"],
        tensors["weights.network.retrieval.middle.to_q.weight"],
    )


@pytest.mark.parametrize("steps", [3, 13])
def test_the_average_has_seen_the_last_step(tmp_path, steps):
    tensors, state = train(set_up(tmp_path, steps=steps, ema_decay=0.0))
    assert state["average_updates"] == 1 + steps // 10
    for name, value in tensors.items():
        if name.startswith("average."):
            assert torch.equal(value, tensors[f"weights.{name.removeprefix('average.')}"]), name


def kill_and_resume(folder, whole, kills, **changes):
    """Kills a process at a random moment `kills` times, and compares the end with `whole`'s."""
    rng = random.Random(kills)
    for _ in range(kills):
        started = command(folder, 0.1, **changes)
        victims, left = [], rng.randrange(1, 5)  # lines of steps
        while left:
            word, _, number = started.stdout.readline().partition(" ")
            if word == "process":
                victims.append(int(number))
            left -= word == "step"
        time.sleep(rng.random() * 0.15)
        os.kill(rng.choice(victims), signal.SIGKILL)
        assert finish(started)[0] != 0
    code, _, err = finish(command(folder, **changes))
    assert code == 0, err
    tensors, state = read_checkpoint(set_up(folder))
    same(whole[0], tensors)
    assert state == whole[1]


def test_a_killed_run_ends_with_the_same_weights(tmp_path, whole):
    kill_and_resume(tmp_path, whole, 2, checkpoint_every=2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_twenty_times_ends_with_the_same_weights(tmp_path, processes):
    changes = {"steps": 120, "checkpoint_every": 1, "processes": processes}
    code, _, err = finish(command(tmp_path / "whole", **changes))
    assert code == 0, err
    whole = read_checkpoint(set_up(tmp_path / "whole"))
    kill_and_resume(tmp_path / "killed", whole, 20, **changes)


def test_an_interrupted_run_saves_its_last_step_and_goes_on(tmp_path, whole):
    process = command(tmp_path, 0.2, checkpoint_every=100)
    for _ in range(6):
        process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 130 and "the same command again" in out, err
    step = read_checkpoint(set_up(tmp_path))[1]["step"]
    assert 4 <= step <= 6
    assert load(tmp_path / "run" / "run.safetensors").card.training["steps_done"] == step
    code, _, err = finish(command(tmp_path, checkpoint_every=100))
    assert code == 0, err
    same(whole[0], read_checkpoint(set_up(tmp_path))[0])


def test_two_processes_give_what_one_gives_with_accumulation_and_go_on(tmp_path):
    """Bit for bit: each process has in one pass what one process has in two."""
    code, _, err = finish(command(tmp_path / "one", accumulate=2))
    assert code == 0, err
    code, _, err = finish(command(tmp_path / "two", processes=2))
    assert code == 0, err
    one, two = (read_checkpoint(set_up(tmp_path / name)) for name in ("one", "two"))
    same(one[0], two[0])
    assert one[1] == two[1]
    (tmp_path / "two" / "run" / "step-00000012.safetensors").unlink()
    code, _, err = finish(command(tmp_path / "two", processes=2))
    assert code == 0, err
    again = read_checkpoint(set_up(tmp_path / "two"))
    same(two[0], again[0])
    assert two[1] == again[1]
    run = json.loads((tmp_path / "two" / "run" / "run.json").read_text())
    assert run["samples_per_step"] == 4


def test_a_loss_that_is_not_finite_stops_with_the_step_and_its_pictures(tmp_path, monkeypatch):
    fixed, calls = training_run.draw_noise, []

    def broken(seed, numbers, *rest):
        calls.append(numbers)
        steps, noise = fixed(seed, numbers, *rest)
        if len(calls) == 10:  # the second pass of step 5
            noise[1] = torch.nan
        return steps, noise

    monkeypatch.setattr(training_run, "draw_noise", broken)
    config = set_up(tmp_path, accumulate=2, checkpoint_every=2, targets=2)
    message = sentence(training_run.train, config, TinyBase())
    items = training_run.make_loader(training_run.plan_cache(
        training_run.open_data_set(config.data), TinyBase(), config), config)  # fmt: skip
    targets = dict.fromkeys(name for names in list(items)[9].names for name in names[:2])
    assert "step 5" in message and f"targets {', '.join(targets)};" in message
    tensors, state = read_checkpoint(config)
    assert state["step"] == 4 and all(bool(t.isfinite().all()) for t in tensors.values())


def test_a_loss_that_is_not_finite_names_the_targets_of_all_processes(tmp_path):
    code, _, err = finish(command(tmp_path, processes=2, learning_rate=1e30, views=1))
    config = set_up(tmp_path, views=1)
    step = int(re.search(r"stopped at step (\d+):", err)[1])
    cache = training_run.plan_cache(training_run.open_data_set(config.data), TinyBase(), config)
    loaders = [list(training_run.make_loader(cache, config, rank, 2)) for rank in (0, 1)]
    names = [item[0] for loader in loaders for item in loader[step - 1].names]
    assert code and f"targets {', '.join(dict.fromkeys(names))};" in err


def test_another_run_is_refused_before_its_cache_is_filled(tmp_path, monkeypatch):
    train(set_up(tmp_path, steps=1))
    monkeypatch.delattr(training_run, "fill_cache")
    other = set_up(tmp_path, steps=1, views=1)
    assert "views = 2, not 1" in sentence(training_run.train, other, TinyBase())


def test_a_refused_cache_leaves_the_folder_to_another_run(tmp_path, monkeypatch):
    def fail(*_):
        raise RetrievalError("The VAE gives values that are not finite; choose another VAE.")

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "fill_cache", fail)
        sentence(training_run.train, set_up(tmp_path, steps=1), TinyBase())
    train(set_up(tmp_path, steps=1, views=1))


def test_processes_that_share_no_folders_are_refused(tmp_path, monkeypatch):
    train(set_up(tmp_path, steps=3))
    monkeypatch.setattr(training_run, "gather", lambda values, world: [*values, 0])
    words = sentence(training_run.train, set_up(tmp_path, steps=3), TinyBase())
    assert "checkpoints of the steps 3, 0" in words
    monkeypatch.setattr(training_run, "fill_cache", lambda *_: None)  # all is another's share
    words = sentence(training_run.train, set_up(tmp_path / "new"), TinyBase())
    assert "lacks what other processes" in words


def test_the_size_is_the_bases_own(tmp_path, monkeypatch):
    monkeypatch.setitem(training_run.NATIVE_SIZE, "sd15", 128)
    config = set_up(tmp_path, steps=1, size=None)
    training_run.train(config, TinyBase())
    assert load(config.out / "run.safetensors").card.training["size"] == 128


def test_the_decoder_is_stored_in_the_rank_that_the_settings_say_with_its_error(tmp_path):
    config = set_up(tmp_path, steps=2, ema_decay=None)
    train(config)
    whole = load(config.out / "run.safetensors")
    training_run.train(replace(config, decoder_rank=3), TinyBase())
    cut = load(config.out / "run.safetensors")
    lost = total = 0.0
    for name, weight in whole.decoder.items():
        total += float(weight.double().square().sum())
        rows = weight.double().flatten(1) if weight.ndim > 1 else weight
        if weight.ndim > 1 and 3 * sum(rows.shape) < rows.numel():
            lost += float(torch.linalg.svdvals(rows)[3:].square().sum())
            assert torch.linalg.matrix_rank(cut.decoder[name].double().flatten(1), rtol=1e-2) <= 3
    told = cut.card.training
    assert told["decoder_rank"] == 3 and "decoder_error" not in whole.card.training
    assert (lost / total) ** 0.5 == pytest.approx(told["decoder_error"], rel=0.02) and lost


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    config = set_up(tmp_path)
    written, save = [], files.safetensors.torch.save_file

    def full(tensors, path, metadata=None):
        if "step-" in str(path):
            written.append(path)
            if len(written) == 2:
                Path(path).write_bytes(b"half a file")
                raise OSError(28, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(files.safetensors.torch, "save_file", full)
    assert "No space left" in sentence(training_run.train, config, TinyBase())
    assert [p.name for p in config.out.glob("*step-*")] == ["step-00000003.safetensors"]
    assert read_checkpoint(config)[1]["step"] == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learning_rate": 2e-3}, "learning_rate = 0.001, not 0.002"),
        ({"lock": "lock_decoder"}, "lock = train_both, not lock_decoder"),
        ({"batch_size": 3}, "samples_per_step = 2, not 3"),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path, changes, told):
    folder = training_run.RunFolder(tmp_path, 2)
    describe(folder, set_up(tmp_path))
    assert told in sentence(describe, folder, set_up(tmp_path, **changes))


def describe(folder, config):
    base = TinyBase()
    cache = training_run.plan_cache(training_run.open_data_set(config.data), base, config)
    training_run.describe_run(folder, config, base, cache, 1, True)


def test_settings_that_do_not_change_the_result_may_change(tmp_path):
    folder = training_run.RunFolder(tmp_path, 2)
    describe(folder, set_up(tmp_path))
    describe(folder, set_up(tmp_path, workers=1, checkpoint_every=7, batch_size=1, accumulate=2))


def test_a_changed_data_set_is_refused(tmp_path):
    folder = training_run.RunFolder(tmp_path, 2)
    describe(folder, set_up(tmp_path))
    shutil.rmtree(tmp_path / "set")
    write_pictures(tmp_path, rows=[("ann", "bob", 0, True, True)] * 3)
    message = sentence(describe, folder, set_up(tmp_path))
    assert "data set" in message and "changed" in message


def test_damaged_checkpoints_are_passed_over_and_told_if_none_is_left(tmp_path):
    folder = training_run.RunFolder(tmp_path, 2)
    for step in (1, 2, 3):
        folder.save(step, {"t": torch.full((3,), float(step))}, {"step": step})
    folder.wait()
    paths = folder.list_checkpoints()
    assert [p.name for p in paths] == ["step-00000002.safetensors", "step-00000003.safetensors"]
    paths[1].write_bytes(paths[1].read_bytes()[:-4])
    tensors, state = folder.load_newest()
    assert state == {"step": 2} and torch.equal(tensors["t"], torch.full((3,), 2.0))
    paths[0].write_bytes(b"")
    assert "No checkpoint" in sentence(folder.load_newest)


def test_half_precision_on_a_cpu_is_refused_in_fp16(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in sentence(training_run.train, set_up(tmp_path, precision="fp16"), None)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_launcher_that_would_wrap_the_network_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    assert kind in sentence(training_run.train, set_up(tmp_path), None)


def test_the_network_is_written_where_the_settings_say(tmp_path):
    config = set_up(tmp_path, steps=1, network=tmp_path / "elsewhere" / "net.safetensors")
    assert training_run.train(config, TinyBase()) == config.network
    assert load(config.network, "sd15").card.training["steps_done"] == 1
    assert not list(config.out.glob("run.safetensors"))


def test_bf16_low_rank_and_recomputed_activations_run_together(tmp_path):
    changes = {"precision": "bf16", "rank": 2, "checkpoint_activations": True}
    code, _, err = finish(command(tmp_path, **changes))
    assert code == 0, err
    tensors, _ = read_checkpoint(set_up(tmp_path))
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    with open(tmp_path / "run" / "run.json") as file:
        assert json.load(file)["precision"] == "bf16"


def write_run(folder, shape=None, **settings):
    """Eight pictures and a checkpoint of random weights; the command's flags to train on them."""
    write_pictures(folder, [("ann", "bob", 0, True, True)] * 8)
    words = write_tokenizer(folder / "tokenizer")
    weights = make_checkpoint("sd15", words, shape)
    base = write_checkpoint(folder / "base.safetensors", weights)
    values = {
        "base": base, "data": folder / "set", "out": folder / "out", "cache": folder / "cache",
        "tokenizer": folder / "tokenizer", "views": 1, "references": 2, "warmup-steps": 0,
        "precision": "float32", "workers": 0, "sheet-every": "none", "size": 64, **settings,
    }  # fmt: skip
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def run_command(flags):
    """The losses of the steps, all of one timestep and one noise, so that they are comparable."""
    losses, fixed = [], training_run.draw_noise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run.Terminal, "update", lambda _, step, new: losses.append(new))
        patch.setattr(
            training_run,
            "draw_noise",
            lambda seed, numbers, *rest: fixed(seed, torch.zeros_like(numbers), *rest),
        )
        assert main(flags) == 0
    return [one["loss"] for one in losses]


def test_a_shrunken_checkpoint_learns_eight_pictures(tmp_path):
    flags = write_run(tmp_path, **{"steps": 24, "batch-size": 4, "learning-rate": 3e-3})
    losses = run_command(flags)
    assert len(losses) == 24 and sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses


@pytest.mark.slow
def test_a_checkpoint_of_sd15s_true_shape_is_trained_end_to_end(tmp_path):
    """The U-Net's shape is the true one; the VAE has two levels and the text encoder two layers."""
    settings = {"steps": 8, "batch-size": 1, "learning-rate": 3e-4, "rank": 4}
    losses = run_command(write_run(tmp_path, SD15, **settings))
    assert len(losses) == 8 and losses[-1] < losses[0], losses
    network = load(tmp_path / "out" / "out.safetensors", "sd15")
    assert network.config == SD15 and network.decoder


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_command_trains_on_a_checkpoint_and_goes_on(tmp_path, name, capsys):
    write_pictures(tmp_path)
    words = write_tokenizer(tmp_path / "tokenizer")
    base = write_checkpoint(tmp_path / "base.safetensors", make_checkpoint(name, words))
    file = tmp_path / "run.toml"
    file.write_text(
        f"base = '{base}'\ndata = '{tmp_path / 'set'}'\nout = '{tmp_path / 'out'}'\n"
        f"cache = '{tmp_path / 'cache'}'\ntokenizer = '{tmp_path / 'tokenizer'}'\n"
        "preset = ['compose-9k', 'lock-decoder']\nsteps = 2\nwarmup_steps = 1\nsize = 64\n"
        "batch_size = 1\nviews = 1\nprecision = 'float32'\nworkers = 1\nreferences = 2\n"
    )
    assert main([str(file)]) == 0
    network = load(tmp_path / "out" / "out.safetensors", name)
    assert network.card.training["task"] == "composition" and not network.decoder
    assert "Training on" in capsys.readouterr().out
    assert main([str(file)]) == 0  # all steps are done
    assert main([str(file), "--steps", "3"]) == 2
    assert "steps = 2, not 3" in capsys.readouterr().err
