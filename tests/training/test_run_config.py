"""Configuration of a training run: TOML, flags, presets, and what is refused."""

from pathlib import Path

import pytest
from refusal import sentence

from retrieval_core.training.run_config import (
    PRESETS,
    RunConfig,
    make_config,
    read_config,
    read_toml,
)

PATHS = {"base": "base.safetensors", "data": "set", "out": "run"}
FLAGS = [text for name, path in PATHS.items() for text in (f"--{name}", path)]


def test_flags_win_over_the_file_which_wins_over_presets(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("preset = ['compose-45k', 'lock-decoder']\nsteps = 700\ntext_drop = 0.1\n")
    config = read_config([str(file), *FLAGS, "--steps", "800"])
    assert (config.task, config.lock) == ("composition", "lock_decoder")
    assert (config.steps, config.text_drop) == (800, 0.1)
    assert config.base == Path("base.safetensors")


def test_a_file_alone_is_a_whole_configuration(tmp_path):
    file = tmp_path / "run.toml"
    lines = [f"{name} = '{path}'" for name, path in PATHS.items()]
    lines += ["token_budget = 300", "ema_decay = 'none'", "checkpoint_activations = true"]
    lines += ["learning_rate = 1", "zero_terminal_snr = false", "vae = '~/vae'"]
    file.write_text("\n".join(lines))
    config = read_config([str(file)])
    assert (config.token_budget, config.ema_decay, config.checkpoint_activations) == (300, None, 1)
    assert config.learning_rate == 1.0 and config.zero_terminal_snr is False
    assert config.vae == Path.home() / "vae"


def test_presets_have_the_papers_numbers():
    config = make_config({**PATHS, "preset": "recon-9k"})
    assert (config.task, config.steps, config.lock) == ("same character", 9000, "train_both")
    assert (config.text_drop, config.references) == (0.5, 4)
    assert make_config({**PATHS, "preset": ["recon-9k", "text-drop-0.8"]}).text_drop == 0.8
    for preset in PRESETS:
        assert make_config({**PATHS, "preset": preset}).preset == (preset,)


def test_all_settings_are_json():
    import json

    config = make_config({**PATHS, "preset": ["recon-9k"]})
    values = json.loads(json.dumps(config.as_json()))
    assert make_config({k: "none" if v is None else v for k, v in values.items()}) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 0}, "steps is 0; it must be 1 or more"),
        ({"steps": "many"}, "steps is 'many'; it must be a whole number"),
        ({"steps": 1.5}, "steps is 1.5; it must be a whole number"),
        ({"rank": True}, "rank is True; it must be a whole number or 'none'"),
        ({"text_drop": 1.5}, "text_drop is 1.5; it must be from 0 to 1"),
        ({"learning_rate": "nan"}, "learning_rate is nan; it must be a finite number"),
        ({"size": 500}, "size is 500; it must be a multiple of 8"),
        ({"steps": 50}, "warmup_steps is 100; it must be from 0 to below steps, 50"),
        ({"task": "both", "references": 1}, "references is 1; it must be 2 or more"),
        ({"task": "portraits"}, "task is 'portraits'; it must be 'same character'"),
        ({"lock": "lock_both", "rank": 8}, "rank 8 has no effect with lock_both"),
        ({"lock": "lock_decoder", "decoder_rank": 8}, "decoder_rank 8 has no effect with lock_dec"),
        ({"preset": "recon-10k"}, "no preset 'recon-10k'; choose from recon-9k"),
        ({"preset": 9000}, "preset is 9000"),
        ({"stepz": 9000}, "no training setting 'stepz'"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; it must be from 0 to below 1"),
    ],
)
def test_wrong_settings_are_named(values, words):
    assert words in sentence(make_config, {**PATHS, **values})


def test_a_missing_setting_is_named():
    assert "setting data is missing" in sentence(make_config, {"base": "b", "out": "o"})


def test_an_unusable_file_is_named(tmp_path):
    assert "run.toml' cannot be read" in sentence(read_toml, tmp_path / "run.toml")
    (tmp_path / "run.toml").write_text("steps: 9000")
    assert "run.toml' cannot be read" in sentence(read_toml, tmp_path / "run.toml")


def test_an_optimiser_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    values = {**PATHS, "optimizer": "adamw-8bit"}
    assert "needs the package bitsandbytes" in sentence(make_config, values)


def test_a_configuration_made_in_code_is_checked_too():
    path = Path("x")
    assert "views is 0" in sentence(RunConfig, path, path, path, views=0)
