"""Base models from checkpoints of the true key names: what they compute, and what is refused."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from base_files import (
    SHAPES,
    make_checkpoint,
    make_encoders,
    make_vae,
    rename_vae,
    write_checkpoint,
    write_tokenizer,
)
from refusal import sentence
from safetensors.torch import load_file

from retrieval_core.network.unet import UNet, timestep_embedding
from retrieval_core.training.base_checkpoint import load_base
from retrieval_core.training.run_config import RunConfig

PROMPTS = ["a cat", "", "cat " * 100]
SIZES = [(512, 512), (1024, 768), (64, 64)]
WORDS = 516


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of each base, and a tokenizer."""
    folder = tmp_path_factory.mktemp("bases")
    assert write_tokenizer(folder / "tokenizer") == WORDS
    for name in SHAPES:
        write_checkpoint(folder / f"{name}.safetensors", make_checkpoint(name, WORDS))
    return folder


@pytest.fixture
def config(folder):
    def make(base="sd15.safetensors", **settings):
        base = base if hasattr(base, "parent") else folder / base
        settings = {"tokenizer": str(folder / "tokenizer"), **settings}
        return RunConfig(base, folder / "set", folder / "run", **settings)

    return make


def tokenize(prompts, padding):
    """Numbers of words by hand: bytes, "cat" as one word, 77 in all, cut off."""
    rows = []
    for prompt in prompts:
        words = [WORDS - 3 if word == "cat" else 256 + ord(word) - 33 for word in prompt.split()]
        words = [WORDS - 2, *words[:75], WORDS - 1]
        rows.append(words + [padding] * (77 - len(words)))
    return torch.tensor(rows)


@pytest.mark.parametrize("name", SHAPES)
def test_a_base_is_recognised_and_its_unet_loaded(config, folder, name):
    base = load_base(config(f"{name}.safetensors"))
    assert (base.name, base.unet.config) == (name, SHAPES[name])
    stored = load_file(folder / f"{name}.safetensors")
    for key, weight in base.unet.state_dict().items():
        assert torch.equal(weight, stored[f"model.diffusion_model.{key}"])
    assert not any(p.requires_grad for p in base.unet.parameters())


def test_the_fingerprint_is_the_files_sha256_unless_other_parts_are_named(config, folder):
    path = folder / "sd15.safetensors"
    assert load_base(config()).fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    with_vae = load_base(config(vae=folder / "sd21.safetensors"))
    assert with_vae.fingerprint != load_base(config()).fingerprint


@pytest.mark.parametrize(("name", "scale"), [("sd15", 0.18215), ("sdxl", 0.13025)])
def test_the_vae_gives_scaled_latents_and_their_pixels(config, name, scale):
    vae, plain = load_base(config(f"{name}.safetensors")).vae, make_vae()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = plain.encode(pixels).latent_dist.mean * scale
    torch.testing.assert_close(vae.encode(pixels), latents)
    torch.testing.assert_close(vae.decode(latents), plain.decode(latents / scale).sample)


def test_another_vae_is_read_from_a_file_or_a_folder(config, folder, tmp_path):
    other = make_vae()
    other.encoder.conv_in.weight.mul_(2)
    pixels = torch.rand(1, 3, 16, 16)
    expected = other.encode(pixels).latent_dist.mean * 0.18215
    write_checkpoint(tmp_path / "vae.safetensors", rename_vae(other.state_dict()))
    other.save_pretrained(tmp_path / "vae")
    for path in (tmp_path / "vae.safetensors", tmp_path / "vae"):
        torch.testing.assert_close(load_base(config(vae=path)).vae.encode(pixels), expected)


def test_sd15_takes_the_last_layer_of_clip(config):
    (clip,) = make_encoders("sd15", WORDS)
    context, y = load_base(config()).encode_prompts(PROMPTS, SIZES)
    expected = clip(tokenize(PROMPTS, WORDS - 1)).last_hidden_state
    torch.testing.assert_close(context, expected)
    assert y is None


def test_old_names_of_clip_are_read(config, tmp_path):
    tensors = make_checkpoint("sd15", WORDS)
    old = {key.replace("transformer.text_model.", "transformer."): t for key, t in tensors.items()}
    base = load_base(config(write_checkpoint(tmp_path / "old.safetensors", old)))
    expected = load_base(config()).encode_prompts(PROMPTS, SIZES)[0]
    assert torch.equal(base.encode_prompts(PROMPTS, SIZES)[0], expected)


def test_sd21_pads_its_prompts_with_zeros(config):
    (clip,) = make_encoders("sd21", WORDS)
    context, _ = load_base(config("sd21.safetensors")).encode_prompts(PROMPTS, SIZES)
    torch.testing.assert_close(context, clip(tokenize(PROMPTS, 0)).last_hidden_state)


def test_sdxl_takes_the_last_layers_but_one_and_the_pictures_size(config):
    clip, open_clip = make_encoders("sdxl", WORDS)
    context, y = load_base(config("sdxl.safetensors")).encode_prompts(PROMPTS, SIZES)
    first = clip(tokenize(PROMPTS, WORDS - 1), output_hidden_states=True).hidden_states[-2]
    second = open_clip(tokenize(PROMPTS, 0), output_hidden_states=True)
    torch.testing.assert_close(context, torch.cat([first, second.hidden_states[-2]], -1))
    torch.testing.assert_close(y[:, :1280], second.text_embeds)
    for row, (height, width) in zip(y, SIZES):
        numbers = torch.tensor([height, width, 0, 0, height, width])
        torch.testing.assert_close(row[1280:], timestep_embedding(numbers, 256).flatten())


def test_text_encoder_and_tokenizer_are_read_from_a_folder(config, tmp_path):
    (clip,) = make_encoders("sd15", WORDS)
    clip.text_model.final_layer_norm.weight.mul_(3)
    clip.save_pretrained(tmp_path / "text_encoder")
    write_tokenizer(tmp_path / "tokenizer")
    base = load_base(config(text_encoder=tmp_path, tokenizer=None))
    expected = clip(tokenize(PROMPTS, WORDS - 1)).last_hidden_state
    torch.testing.assert_close(base.encode_prompts(PROMPTS, SIZES)[0], expected)


def test_an_inpainting_base_has_nine_channels(config, tmp_path):
    shape = replace(SHAPES["sd15"], in_channels=9)
    tensors = make_checkpoint("sd15", WORDS, shape)
    base = load_base(config(write_checkpoint(tmp_path / "inpaint.safetensors", tensors)))
    assert base.name == "sd15" and base.unet.config == shape


# Prediction and schedule


def test_the_prediction_is_read_off_the_checkpoint(config, tmp_path):
    def schedule(name, tensors=None, metadata=None, **settings):
        made = make_checkpoint(name, WORDS) | (tensors or {})
        path = write_checkpoint(tmp_path / "base.safetensors", made, **(metadata or {}))
        found = load_base(config(path, **settings)).schedule
        return found.prediction, found.zero_terminal_snr

    mark = {"v_pred": torch.ones(1)}
    assert schedule("sd15") == ("eps", False)
    assert schedule("sd15", mark) == ("v", False)
    assert schedule("sd15", mark | {"ztsnr": torch.ones(1)}) == ("v", True)
    assert schedule("sd15", metadata={"modelspec.prediction_type": "v"}) == ("v", False)
    assert schedule("sd15", prediction="v", zero_terminal_snr=True) == ("v", True)
    told = {"modelspec.prediction_type": "epsilon"}
    assert schedule("sd15", mark, told) == ("eps", False)


def test_the_two_kinds_of_sd21_are_told_apart_by_a_bias(config, tmp_path):
    key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    tensors = make_checkpoint("sd21", WORDS)
    for spread, prediction in ((0.05, "eps"), (0.2, "v")):
        tensors[key] = spread * torch.tensor([-1.0, 1.0]).repeat(32)
        path = write_checkpoint(tmp_path / "base.safetensors", tensors)
        assert load_base(config(path)).schedule.prediction == prediction


def test_schedules_that_cannot_be_trained_are_refused(config, tmp_path):
    words = sentence(load_base, config(zero_terminal_snr=True))
    assert "zero terminal SNR cannot train a base that predicts eps" in words
    tensors = make_checkpoint("sd15", WORDS) | {"edm_mean": torch.ones(4)}
    path = write_checkpoint(tmp_path / "edm.safetensors", tensors)
    assert "noise of EDM" in sentence(load_base, config(path))


# Bad input


def test_pickled_checkpoints_and_folders_are_refused(config, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "base.ckpt")
    for path in (tmp_path / "base.ckpt", tmp_path):
        assert "is not a safetensors file" in sentence(load_base, config(path))


def test_missing_and_damaged_files_are_refused(config, folder, tmp_path):
    path = tmp_path / "base.safetensors"
    assert "There is no base" in sentence(load_base, config(path))
    path.write_bytes((folder / "sd15.safetensors").read_bytes()[:100_000])
    assert "not a whole safetensors file" in sentence(load_base, config(path))


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("model.diffusion_model.", "has no weights named 'model.diffusion_model.*'"),
        ("first_stage_model.", "holds no VAE; name one with the setting vae"),
        ("cond_stage_model.", "has no text encoder"),
        ("model.diffusion_model.out.", "U-Net of"),
    ],
)
def test_a_checkpoint_without_a_part_is_refused(config, tmp_path, part, words):
    tensors = make_checkpoint("sd15", WORDS)
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(part)}
    path = write_checkpoint(tmp_path / "part.safetensors", rest)
    assert words in sentence(load_base, config(path))


def test_a_unet_of_another_family_is_refused(config, tmp_path):
    unet = UNet(replace(SHAPES["sdxl"], context_dim=1280, adm_in_channels=2560))
    tensors = {f"model.diffusion_model.{k}": v for k, v in unet.state_dict().items()}
    path = write_checkpoint(tmp_path / "refiner.safetensors", tensors)
    assert "a context of width 1280" in sentence(load_base, config(path))


def test_a_tokenizer_that_does_not_fit_is_refused(config, tmp_path, monkeypatch):
    assert "cannot be loaded" in sentence(load_base, config(tokenizer=str(tmp_path / "none")))
    write_tokenizer(tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | {"extra": WORDS}))
    words = sentence(load_base, config(tokenizer=str(tmp_path)))
    assert "knows 517 words and the text encoder 516" in words
