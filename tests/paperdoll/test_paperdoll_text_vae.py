"""The paper-doll world's tokenizer, text encoder, fixed VAE, and the base model's file."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from refusal import sentence
from safetensors.torch import load_file, save_file

from retrieval_core.files import read_metadata
from retrieval_core.network.unet import UNetConfig
from retrieval_core.paperdoll.draw import render
from retrieval_core.paperdoll.model import CONFIG, PaperdollModel, load_base
from retrieval_core.paperdoll.text import CONCEPTS, LENGTH, PAD, TextEncoder, Tokenizer
from retrieval_core.paperdoll.vae import PatchVAE
from retrieval_core.paperdoll.world import (
    BACKGROUNDS,
    EXPRESSIONS,
    POSES,
    Figure,
    random_identity,
    random_outfit,
    random_scene,
)

# Narrow, so that the tests are fast; of the bundled model's form.
TINY = UNetConfig(32, (1, 2), (0, 1), (0, 1), 1, 16, 6, 6, num_head_channels=16)


def pictures(count, seed):
    """Rendered figures, float32 [N, 3, 64, 64] in 0..1."""
    rng = np.random.default_rng(seed)
    drawn = [
        render(Figure(random_identity(rng), random_outfit(rng), random_scene(rng))).image
        for _ in range(count)
    ]
    return torch.from_numpy(np.stack(drawn)).movedim(-1, 1).float() / 255


@pytest.fixture(scope="module")
def vae():
    return PatchVAE.fit(pictures(120, 0), CONFIG.in_channels)


# Tokenizer and text encoder


def test_every_tag_and_concept_has_its_own_token():
    tokenizer = Tokenizer()
    tags = [*POSES, *EXPRESSIONS, *BACKGROUNDS, *CONCEPTS]
    ids = [tokenizer(tag)[0] for tag in tags]
    assert len(set(ids)) == len(tags) and PAD not in ids


def test_tokens_never_move():
    """The vocabulary's order is part of the trained weights: only its end may grow."""
    expected = ["", "standing", "waving", "arms up", "hands on hips", "arms spread", "sitting"]
    expected += ["jumping", "handstand", "smile", "laughing", "sad", "angry", "surprised"]
    expected += ["studio", "sky", "beach", "forest", "city", "night", "room", "sunset"]
    expected += ["figure", "face", "clothes"]
    assert list(Tokenizer().words[: len(expected)]) == expected


def test_prompts_are_read_leniently_and_padded():
    tokenizer = Tokenizer()
    expected = [tokenizer.ids[tag] for tag in ("arms up", "smile", "night")] + [PAD]
    assert tokenizer("arms up, smile, night") == expected
    assert tokenizer(" Arms_Up ,SMILE,,  night, ") == expected
    assert tokenizer("") == tokenizer(" , ") == [PAD] * LENGTH


def test_what_is_not_known_is_refused():
    message = sentence(Tokenizer(), "smile, red hair")
    assert "'red hair'" in message and "handstand" in message and "sunset" in message
    message = sentence(Tokenizer(), "smile, sad, angry, waving, sky")
    assert "5 tags" in message and "at most 4" in message


def test_text_encoder_gives_a_context_for_each_token():
    torch.manual_seed(0)
    encoder = TextEncoder(16).eval()
    with torch.no_grad():
        contexts = encoder.encode(["smile, sky", "", "smile, sky", "sad, sky"])
    assert contexts.shape == (4, LENGTH, 16)
    assert torch.equal(contexts[0], contexts[2])
    assert not torch.equal(contexts[0], contexts[1]) and not torch.equal(contexts[0], contexts[3])


# VAE


def test_the_basis_is_orthonormal(vae):
    basis = vae.basis.double()
    assert basis.shape == (24, 48)
    torch.testing.assert_close(basis @ basis.T, torch.eye(24).double(), rtol=0, atol=1e-5)


def test_figures_come_back_nearly_as_they_were(vae):
    unseen = pictures(60, 1)
    errors = (vae.decode(vae.encode(unseen)) - unseen).square().flatten(1).mean(1)
    psnr = -10 * torch.log10(errors)
    assert psnr.min() > 26 and psnr.mean() > 28


def test_latents_shape_and_scale(vae):
    latents = vae.encode(pictures(60, 2))
    assert latents.shape == (60, 24, 16, 16)
    assert vae.encode(torch.rand(1, 3, 20, 8)).shape == (1, 24, 5, 2)
    deviations = latents.std((0, 2, 3))
    assert deviations.argmax() == 0 and deviations[0] == pytest.approx(2.0, abs=0.25)
    # Evened out half way, the components still come in order, roughly.
    assert deviations[:4].mean() > deviations[-4:].mean() > 0.1


def test_encoding_is_affine_and_decoding_its_inverse_on_latents(vae):
    double = PatchVAE(24)
    double.load_state_dict(vae.state_dict())
    double = double.double()
    one, two = pictures(2, 3).double().split(1)
    mixed = double.encode(0.3 * one + 0.7 * two)
    torch.testing.assert_close(mixed, 0.3 * double.encode(one) + 0.7 * double.encode(two))
    # Small latents decode to greys well within 0..1, so that nothing is clamped.
    latents = torch.randn(2, 24, 16, 16, generator=torch.Generator().manual_seed(0)).double() * 0.02
    decoded = double.decode(latents)
    assert decoded.min() > 0 and decoded.max() < 1
    torch.testing.assert_close(double.encode(decoded), latents, rtol=1e-5, atol=1e-6)
    between = double.decode(0.4 * latents[:1] + 0.6 * latents[1:])
    torch.testing.assert_close(between, 0.4 * decoded[:1] + 0.6 * decoded[1:])


def test_decoding_a_figure_twice_changes_nothing_more(vae):
    once = vae.decode(vae.encode(pictures(20, 4)))
    twice = vae.decode(vae.encode(once))
    assert (twice - once).abs().mean() < 2e-3  # only where colours were clamped to 0..1


@pytest.mark.parametrize("edge", [4, 2])
def test_the_principal_components_are_those_of_the_patches(edge):
    """Against numpy's singular value decomposition of all patches, cut out with loops."""
    images, inside, across = pictures(6, 5), range(edge), range(64 // edge)
    patches = np.array([
        [image[c, edge * y + i, edge * x + j] for c in range(3) for i in inside for j in inside]
        for image in images.double().numpy() for y in across for x in across
    ])  # fmt: skip
    mean = patches.mean(0)
    _, sizes, vectors = np.linalg.svd(patches - mean, full_matrices=False)
    stds = sizes / math.sqrt(len(patches))
    vae = PatchVAE.fit(images, 8, edge)
    np.testing.assert_allclose(vae.mean.numpy(), mean, atol=1e-6)
    likeness = np.abs(vectors[:8] @ vae.basis.double().numpy().T)
    np.testing.assert_allclose(likeness, np.eye(8), atol=1e-3)
    expected = edge / 2 / np.sqrt(stds[0] * stds[:8])
    np.testing.assert_allclose(vae.scale.numpy(), expected, rtol=1e-5)


def test_smaller_patches_lose_less_and_hide_as_well_under_noise(vae):
    """Of an area's mean colour, a noise level hides as much whatever the patches' size."""
    small, images = PatchVAE.fit(pictures(120, 0), 8, 2), pictures(60, 1)
    latents = small.encode(images)
    assert latents.shape == (60, 8, 32, 32)
    errors = [(one.decode(one.encode(images)) - images).square().mean() for one in (small, vae)]
    assert errors[0] < errors[1]
    means = F.avg_pool2d(latents, 2)[:, 0]  # of 4 noises of deviation 1, with deviation 1 / 2
    assert means.std() / 0.5 == pytest.approx(float(vae.encode(images)[:, 0].std()), rel=0.1)


def test_fitting_is_deterministic():
    images = pictures(30, 6)
    first, second = PatchVAE.fit(images, 24), PatchVAE.fit(images.clone(), 24)
    for name, buffer in first.state_dict().items():
        assert torch.equal(buffer, second.state_dict()[name]), name
    assert not list(first.parameters())


# The base model's file


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = PaperdollModel(TINY)
    made.vae = PatchVAE.fit(pictures(20, 7), TINY.in_channels)
    return made.eval().requires_grad_(False)


@pytest.fixture
def saved(tmp_path, model):
    path = tmp_path / "base.safetensors"
    model.save(path)
    return path


def rewritten(path, tensors=None, **changes):
    metadata = {**read_metadata(path), **changes}
    old = {key: value.clone() for key, value in load_file(path).items()}
    save_file(old if tensors is None else tensors, path, metadata)
    return path


def test_the_base_model_comes_back_with_the_same_bits(saved, model):
    loaded = load_base(saved)
    assert loaded.unet.config == TINY
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert {key.split(".")[0] for key in load_file(saved)} == {"model", "text", "vae"}


def test_a_base_with_smaller_patches_comes_back_with_the_same_bits(tmp_path):
    torch.manual_seed(0)
    made = PaperdollModel(TINY, 2)
    made.vae = PatchVAE.fit(pictures(20, 7), TINY.in_channels, 2)
    made.save(tmp_path / "small.safetensors")
    loaded = load_base(tmp_path / "small.safetensors")
    assert loaded.vae.patch == 2 and loaded.latent_size == 32
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert loaded.noise(1, torch.Generator().manual_seed(0)).shape == (1, 6, 32, 32)
    images = pictures(3, 8)
    assert torch.equal(loaded.vae.encode(images), made.vae.encode(images))


def test_in_half_precision_only_the_trained_weights_are_rounded(tmp_path, model):
    model.save(tmp_path / "half.safetensors", torch.float16)
    loaded = load_base(tmp_path / "half.safetensors")
    for name, value in model.state_dict().items():
        expected = value if name.startswith("vae.") else value.half().float()
        assert torch.equal(loaded.state_dict()[name], expected), name


def test_initialise_makes_every_block_start_as_nothing():
    torch.manual_seed(1)
    made = PaperdollModel(TINY)
    made.initialise()
    zero = {name for name, p in made.unet.named_parameters() if not p.any() and p.ndim > 1}
    ends = (".out_layers.3.weight", ".proj_out.weight")
    expected = {n for n, _ in made.unet.named_parameters() if n.endswith(ends)}
    assert zero == expected | {"out.2.weight"}
    noise = made.noise(2, torch.Generator().manual_seed(0))
    assert noise.shape == (2, 6, 16, 16)
    with torch.no_grad():
        out = made.unet(noise, torch.tensor([5, 900]), made.text.encode(["sky", ""]))
    assert not out.any()


def test_another_format_is_refused(saved):
    assert "'retrieval_controlnet'" in sentence(
        load_base, rewritten(saved, format="retrieval_controlnet")
    )


@pytest.mark.parametrize("part", ["model.diffusion_model.out.2.bias", "text.norm.bias", "vae.mean"])
def test_missing_extra_and_misshapen_keys_are_refused(saved, part):
    whole = {key: value.clone() for key, value in load_file(saved).items()}
    tensors = {key: value for key, value in whole.items() if key != part}
    assert "1 missing" in sentence(load_base, rewritten(saved, tensors))
    extra = {**whole, part.rsplit(".", 1)[0] + ".extra": torch.zeros(1)}
    assert "1 unexpected" in sentence(load_base, rewritten(saved, extra))
    assert "1 misshapen" in sentence(
        load_base, rewritten(saved, {**whole, part: torch.zeros(2, 3)})
    )


def test_keys_of_no_part_are_refused(saved):
    tensors = {**load_file(saved), "lora.up.weight": torch.zeros(1)}
    assert "1 unexpected (first: lora.up.weight)" in sentence(load_base, rewritten(saved, tensors))


def test_a_truncated_file_and_a_broken_configuration_are_refused(saved):
    config = json.dumps({**asdict(TINY), "model_channels": 7})
    sentence(load_base, rewritten(saved, config=config))
    assert "'config'" in sentence(load_base, rewritten(saved, config="{"))
    message = sentence(load_base, rewritten(saved, config=json.dumps(asdict(TINY)), patch="3"))
    assert "'3' pixels a patch" in message
    saved.write_bytes(saved.read_bytes()[:1000])
    assert "not a whole safetensors file" in sentence(load_base, saved)
    assert "There is no file" in sentence(load_base, saved.with_name("other.safetensors"))


def test_an_unwritable_folder_is_refused(tmp_path, model):
    (tmp_path / "file").write_text("")
    assert "Could not write" in sentence(model.save, tmp_path / "file" / "base.safetensors")
