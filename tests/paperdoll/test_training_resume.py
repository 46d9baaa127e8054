"""Killed, interrupted, damaged: the run goes on with the same numbers."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import tiny_training
import torch
from tiny_training import everything, trainer

from retrieval_core.errors import RetrievalError
from retrieval_core.paperdoll import trainer as trainer_module
from retrieval_core.paperdoll.checkpoint import LAST, PREVIOUS, load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """The number of threads can change the last bit of a sum; plots would take most of the time."""
    monkeypatch.setattr(trainer_module, "write_losses", lambda *_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_num_threads(1)
    run = trainer(tmp_path_factory.mktemp("whole"), checkpoint_every=1000)
    run.run()
    return everything(run)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) or (
            name.startswith("history.")
            and torch.equal(found[name].nan_to_num(), value.nan_to_num())
        )
        assert same, name


def start(folder, seconds_per_step):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, tiny_training.__file__, str(folder), str(seconds_per_step)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout.readline().startswith("started")
    return process


def test_resuming_at_every_kind_of_step_changes_nothing(tmp_path, uninterrupted):
    for until in (1, 2, 9, 10, 11, 64, 65, 200, None):
        run = trainer(tmp_path, checkpoint_every=7)
        run.run(until)
    assert_same(everything(run), uninterrupted)


def test_killed_at_random_moments(tmp_path, uninterrupted):
    rng = random.Random(11)
    before = 0
    for _ in range(4):
        process = start(tmp_path, 0.001)
        time.sleep(rng.uniform(0.01, 0.25))
        process.kill()
        process.communicate()
        saved = load_checkpoint(tmp_path)
        now = 0 if saved is None else saved[1]["step"]
        assert now >= before
        before = now
    assert before > 0, "killed too early to test anything"
    run = trainer(tmp_path, checkpoint_every=1000)
    run.run()
    assert_same(everything(run), uninterrupted)


class Killed(BaseException):
    """Stands for the process's end: nothing in the code under test may catch it."""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("crash", range(6))
def test_killed_at_each_step_of_saving(tmp_path, monkeypatch, uninterrupted, crash, after):
    calls = []

    def fatal(function):
        def wrapped(*arguments, **options):
            calls.append(function.__name__)
            if len(calls) - 1 == crash and not after:
                raise Killed
            result = function(*arguments, **options)
            if len(calls) - 1 == crash:
                raise Killed
            return result

        return wrapped

    trainer(tmp_path).run(20)
    assert {LAST, PREVIOUS} <= set(os.listdir(tmp_path))
    run = trainer(tmp_path)
    run._train_step(run.batches.batch(20))
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fatal(safetensors.torch.save_file))
        patch.setattr(os, "fsync", fatal(os.fsync))
        patch.setattr(os, "replace", fatal(os.replace))
        try:
            run.save()
        except Killed:
            pass
        else:
            assert crash >= len(calls)
    resumed = trainer(tmp_path, checkpoint_every=1000)
    # Only once the new file is in place can it be the one that is found.
    assert resumed.step == (21 if crash > 3 or (crash == 3 and after) else 20)
    assert not list(tmp_path.glob(".*"))
    resumed.run()
    assert_same(everything(resumed), uninterrupted)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_last_checkpoint_falls_back(tmp_path, uninterrupted, kept):
    trainer(tmp_path).run(22)
    before = load_checkpoint(tmp_path)[1]["step"]
    data = (tmp_path / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(data[:kept])
    run = trainer(tmp_path)
    assert (before, run.step) == (22, 20)
    # The damaged file must not push out the only good one.
    run.run(21)
    (tmp_path / LAST).unlink()
    assert trainer(tmp_path).step == 20
    run = trainer(tmp_path, checkpoint_every=1000)
    run.run()
    assert_same(everything(run), uninterrupted)


def test_two_damaged_checkpoints_are_refused(tmp_path):
    trainer(tmp_path).run(9)
    for name in (LAST, PREVIOUS):
        (tmp_path / name).write_bytes(b"no checkpoint")
    with pytest.raises(RetrievalError, match="No checkpoint in .* can be read"):
        trainer(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="a child process cannot be sent Ctrl-C on Windows")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_so_in_one_line(tmp_path, uninterrupted, number):
    process = start(tmp_path, 0.01)
    time.sleep(0.3)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    lines = output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Training was interrupted after step ")
    step = int(lines[0].split("after step ")[1].split()[0])
    assert 0 < step < 300
    run = trainer(tmp_path, checkpoint_every=1000)
    assert run.step == step  # the step at hand is not lost
    run.run()
    assert_same(everything(run), uninterrupted)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 2e-2}, "learning_rate = 0.01, not 0.02"),
        ({"steps": 301}, "steps = 300, not 301"),
        ({"precision": "bfloat16"}, "precision = float32, not bfloat16"),
        ({"betas": (0.8, 0.999)}, r"betas = \[0.9, 0.999\], not \[0.8, 0.999\]"),
        ({"description": {"lock": "lock_both"}}, "lock = train_both, not lock_both"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, words):
    trainer(tmp_path, description={"lock": "train_both"}).run(3)
    with pytest.raises(RetrievalError, match=words):
        trainer(tmp_path, **{"description": {"lock": "train_both"}, **changes})
    trainer(tmp_path, description={"lock": "train_both"}, checkpoint_every=50)


def test_a_run_from_before_there_was_a_precision_goes_on(tmp_path):
    trainer(tmp_path).run(3)
    tensors, state = load_checkpoint(tmp_path)
    del state["settings"]["precision"]
    save_checkpoint(tmp_path, tensors, state)
    assert trainer(tmp_path).step == 3
    with pytest.raises(RetrievalError, match="precision = float32, not bfloat16"):
        trainer(tmp_path, precision="bfloat16")


def test_other_parameters_are_refused(tmp_path):
    trainer(tmp_path).run(3)
    owner = tiny_training.Owner()
    owner.unused.requires_grad_(False)
    with pytest.raises(RetrievalError, match="unused = trained, not frozen"):
        trainer(tmp_path, owner=owner)
    owner = tiny_training.Owner()
    owner.unused = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(RetrievalError, match=r"the shape of unused = \[2, 2\], not \[3\]"):
        trainer(tmp_path, owner=owner)


def test_an_unusable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RetrievalError, match="cannot be written"):
        trainer(tmp_path / "file" / "run")
