"""The command that trains the bundled weights: its stages, what each starts from and leaves."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from retrieval_core.files import read_safetensors, save_safetensors
from retrieval_core.network.controlnet import load
from retrieval_core.paperdoll import train
from retrieval_core.paperdoll.batches import BaseBatches
from retrieval_core.paperdoll.bundle import (
    BASE_FILE,
    JUDGE_FILE,
    RETRIEVAL_FILE,
    find_bundled,
    load_bundle,
)
from retrieval_core.paperdoll.measure_training_free import main as measure_training_free
from retrieval_core.paperdoll.model import PATCH, SECOND_CONFIG, load_base

SMALL = (
    "--characters 8 --base-steps 2 --base-batch 4 --critic-steps 2 --retrieval-steps 2 "
    "--retrieval-batch 2 --pairs-base-steps 2 --pairs-retrieval-steps 2 --judge-steps 2 "
    "--judge-figures 16 --precision float32"
).split()


def run(out, *more):
    threads = torch.get_num_threads()
    try:
        return train.main(["--out", str(out), "--threads", str(threads), *SMALL, *more])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert run(out) == 0
    return out


def largest_difference(one, other):
    one, other = read_safetensors(one)[0], read_safetensors(other)[0]
    assert one.keys() == other.keys()
    return max(float((one[k].float() - other[k].float()).abs().max()) for k in one)


def test_all_stages_leave_a_bundle_that_draws(trained, tmp_path):
    for name, folder in (
        (BASE_FILE, "pairs"), (RETRIEVAL_FILE, "pairs"), (JUDGE_FILE, "."),
    ):  # fmt: skip
        (tmp_path / name).write_bytes((trained / folder / name).read_bytes())
    bundle = load_bundle(tmp_path)
    assert bundle.network.card.training["stage"] == "retrieval"
    assert bundle.network.card.training["pairs"] is True
    assert load(trained / RETRIEVAL_FILE).card.training["pairs"] is False
    assert bundle.network.decoder  # the paper's best setting trains it


def test_pairs_go_on_from_the_files_before_and_leave_them(trained, tmp_path):
    """Two small steps away from them; a fresh start, from another seed, would be far away."""
    before = {}
    for name in (BASE_FILE, RETRIEVAL_FILE, train.CRITIC_FILE):
        tensors, metadata = read_safetensors(trained / name)
        # Far from the base's own decoder: training goes on from the trained one.
        tensors = {k: v + 0.25 if k == "decoder.out.2.bias" else v for k, v in tensors.items()}
        save_safetensors(tmp_path / name, tensors, metadata)
        before[name] = (tmp_path / name).read_bytes()
    assert run(tmp_path, "--stage", "pairs", "--seed", "1") == 0
    for name in (BASE_FILE, RETRIEVAL_FILE):
        assert 0 < largest_difference(tmp_path / name, tmp_path / "pairs" / name) < 0.02
    assert all((tmp_path / name).read_bytes() == old for name, old in before.items())


def test_a_finished_run_is_not_trained_again(trained, capsys):
    before = (trained / "pairs" / RETRIEVAL_FILE).read_bytes()
    assert run(trained, "--stage", "pairs") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["stages"] == ["pairs"]
    tensors = read_safetensors(trained / "pairs" / RETRIEVAL_FILE)[0]
    (trained / "again").write_bytes(before)
    assert all(
        torch.equal(tensors[key], value)
        for key, value in read_safetensors(trained / "again")[0].items()
    )


def test_the_second_base_is_trained_and_measured_as_the_first(trained, tmp_path, capsys):
    assert load_base(trained / BASE_FILE).vae.patch == PATCH
    assert run(tmp_path, "--stage", "base", "--recipe", "second", "--base-batch", "2") == 0
    base = load_base(tmp_path / BASE_FILE)
    assert base.unet.config == SECOND_CONFIG and base.latent_size == 32
    (tmp_path / JUDGE_FILE).write_bytes(find_bundled(JUDGE_FILE).read_bytes())
    capsys.readouterr()
    given = f"--weights {tmp_path} --count 2 --steps 1 --json".split()
    assert measure_training_free(given) == 0
    lines = json.loads(capsys.readouterr().out)
    assert 0 <= lines["without retrieval"]["attribute match"]["mean"] <= 100


def test_an_interrupted_base_is_written_and_gone_on_with(tmp_path, monkeypatch, capsys):
    def stop(self, step):
        os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step)

    batch = BaseBatches.batch
    with monkeypatch.context() as patched:
        patched.setattr(BaseBatches, "batch", stop)
        assert run(tmp_path, "--stage", "base") == 130
    assert "the same command again" in capsys.readouterr().out
    early = (tmp_path / BASE_FILE).read_bytes()
    assert load_base(tmp_path / BASE_FILE).vae.basis.any()
    assert run(tmp_path, "--stage", "base") == 0
    assert (tmp_path / BASE_FILE).read_bytes() != early


def test_pairs_without_the_stages_before_are_refused(tmp_path, capsys):
    assert run(tmp_path, "--stage", "pairs") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert BASE_FILE in message and message.endswith(".")
