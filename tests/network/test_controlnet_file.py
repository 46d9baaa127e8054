"""The network's file: nothing is lost on the way, and nothing wrong is taken in."""

import json
import os
from dataclasses import asdict, replace

import pytest
import torch
from refusal import sentence
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from retrieval_core import files
from retrieval_core.bank.encoding import encode_references
from retrieval_core.files import atomic_write, read_metadata, save_safetensors, write_text
from retrieval_core.network.controlnet import (
    BASES,
    FORMAT_VERSION,
    Card,
    RetrievalControlNet,
    load,
    select_decoder,
    subtract_decoder,
)
from retrieval_core.network.unet import UNet, UNetConfig

CONFIG = UNetConfig(32, (1, 2), (1, 1), (0, 1), 1, 16, num_head_channels=16)
RECOMMENDED = {"strength": 1.5, "guidance": "both"}
TRAINING = {"steps": 9000, "lock": "train_both", "note": "Grüße — 図"}


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval().requires_grad_(False)


def network(decoder=True, seed=0):
    made = randomised(
        RetrievalControlNet(CONFIG, Card("paperdoll", dict(RECOMMENDED), dict(TRAINING))), seed
    )
    if decoder:
        made.decoder = select_decoder(randomised(UNet(CONFIG), seed + 1))
    return made


@pytest.fixture(scope="module")
def whole():
    return network()


@pytest.fixture
def saved(tmp_path, whole):
    path = tmp_path / "net.safetensors"
    whole.save(path)
    return path


def rewritten(path, tensors=None, **changes):
    """The file again with other tensors or metadata; None removes a field."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
    old = {key: value.clone() for key, value in load_file(path).items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    save_file(old if tensors is None else tensors, path, metadata)
    return path


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# Round trips


def test_save_and_load_give_the_same_bits(saved, whole):
    loaded = load(saved, "paperdoll")
    assert same(loaded.state_dict(), whole.state_dict())
    assert same(loaded.decoder, whole.decoder) and loaded.decoder_is_difference
    assert loaded.config == CONFIG and loaded.card == whole.card


def test_saving_what_was_loaded_gives_the_same_file(saved, tmp_path):
    again = tmp_path / "again.safetensors"
    load(saved).save(again)
    # safetensors writes the metadata's fields in any order.
    assert read_metadata(again) == read_metadata(saved)
    assert again.stat().st_size == saved.stat().st_size
    assert same(load_file(again), load_file(saved))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_and_kept(tmp_path, whole, dtype):
    path = tmp_path / "half.safetensors"
    whole.save(path, dtype)
    loaded = load(path, dtype=dtype)
    expected = {k: v.to(dtype) for k, v in whole.state_dict().items()}
    assert same(loaded.state_dict(), expected)
    decoder = {k: v.to(dtype) for k, v in whole.decoder.items()}
    assert same(loaded.decoder, decoder)
    wide = load(path, dtype=torch.float32)
    assert same(wide.state_dict(), {k: v.float() for k, v in expected.items()})
    assert same(wide.decoder, decoder)  # as stored: it is cast to the type of the base


def test_a_network_in_another_memory_layout_is_saved_whole(tmp_path, whole):
    path = tmp_path / "net.safetensors"
    twin = network().to(memory_format=torch.channels_last)
    twin.save(path)
    assert same(load(path).state_dict(), whole.state_dict())


def test_a_network_without_decoder_weights(tmp_path):
    path = tmp_path / "net.safetensors"
    network(decoder=False).save(path)
    assert load(path).decoder == {}
    assert not any(key.startswith("decoder.") for key in load_file(path))


def test_keys_and_metadata_are_those_of_the_design(saved):
    metadata = read_metadata(saved)
    assert metadata["format"] == "retrieval_controlnet"
    assert metadata["format_version"] == "2"
    assert metadata["base"] == "paperdoll"
    assert json.loads(metadata["recommended"]) == RECOMMENDED
    assert json.loads(metadata["training"]) == TRAINING
    assert UNetConfig.from_dict(json.loads(metadata["config"])) == CONFIG
    assert len(metadata) == 6
    keys = set(load_file(saved))
    base = UNet(CONFIG).state_dict().keys()
    expected = {f"decoder.{k}" for k in base if k.startswith(("output_blocks.", "out."))}
    expected |= {f"encoder.{k}" for k in base if not k.startswith(("output_blocks.", "out."))}
    sites = {key.split(".")[1] for key in keys if key.startswith("retrieval.")}
    assert sites == set(CONFIG.site_channels())
    assert {key for key in keys if not key.startswith("retrieval.")} == expected


@pytest.mark.parametrize("base", ["sd15", "sd21", "sdxl", "paperdoll"])
def test_queries_are_pooled_by_the_base_at_the_latents_own_resolution(tmp_path, base):
    path = tmp_path / "net.safetensors"
    made = RetrievalControlNet(CONFIG, Card(base))
    made.save(path)
    pooling = 1 if base == "paperdoll" else 2
    assert made.query_pooling == pooling
    factors = CONFIG.site_downsampling()
    for net in (made, load(path, base)):
        for site, layer in net.retrieval.items():
            assert layer.pool == (pooling if factors[site] == 1 else 1)
    # A file that says nothing was trained without.
    rewritten(path, query_pooling=None)
    assert {layer.pool for layer in load(path).retrieval.values()} == {1}


@pytest.mark.parametrize("value", ["0", "9", "-1", "two", "1.5", ""])
def test_query_pooling_that_makes_no_sense_is_refused(saved, value):
    rewritten(saved, query_pooling=value)
    assert repr(value) in sentence(load, saved)


def test_settings_that_a_file_does_not_recommend_are_filled_in(saved):
    rewritten(saved, recommended='{"strength": 0.7}')
    assert load(saved).card.recommended == {"strength": 0.7, "guidance": "cond"}


def test_what_was_loaded_does_not_change_with_the_file(saved, whole):
    loaded = load(saved)
    with open(saved, "r+b") as file:
        size = os.path.getsize(saved)
        file.seek(size // 2)
        file.write(b"\0" * (size - size // 2))
    assert same(loaded.state_dict(), whole.state_dict())
    assert same(loaded.decoder, whole.decoder)


# From a base checkpoint


def test_a_fresh_network_has_the_base_encoder_and_zero_convolutions():
    base = randomised(UNet(CONFIG), 3).state_dict()
    fresh = RetrievalControlNet.from_base(base, "paperdoll", 5, config=CONFIG)
    encoder = fresh.encoder.state_dict()
    assert same(encoder, {k: base[k] for k in encoder})
    for site in fresh.retrieval.values():
        assert not site.zero_conv.weight.any()
        assert torch.equal(site.to_q.weight, site.to_k.weight)
        turn = site.to_q.weight.detach()
        torch.testing.assert_close(turn @ turn.T, torch.eye(len(turn)), rtol=0, atol=1e-5)
    again = RetrievalControlNet.from_base(base, "paperdoll", 5, config=CONFIG)
    other = RetrievalControlNet.from_base(base, "paperdoll", 6, config=CONFIG)
    assert same(fresh.state_dict(), again.state_dict())
    assert not same(fresh.state_dict(), other.state_dict())


def test_a_fresh_network_is_no_view_of_the_base():
    base = randomised(UNet(CONFIG), 3)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    fresh = RetrievalControlNet.from_base(base.state_dict(), "paperdoll", config=CONFIG)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1)
    assert same(dict(base.state_dict()), before)


def test_a_checkpoint_of_something_else_is_refused():
    base = randomised(UNet(CONFIG), 3).state_dict()
    wrong = {key.replace("time_embed", "time_embedding"): value for key, value in base.items()}
    message = sentence(RetrievalControlNet.from_base, wrong, "paperdoll", config=CONFIG)
    assert "encoder weights do not fit" in message and "time_embed.0.bias" in message
    sentence(RetrievalControlNet.from_base, {}, "sd15")


# The decoder


def decoder_of(unet):
    return {k: v.double() for k, v in select_decoder(unet).items()}


@pytest.fixture(scope="module")
def base():
    return randomised(UNet(CONFIG), 3)


@pytest.mark.parametrize(("strength", "share"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0), (1.5, 1.0)])
def test_a_file_holds_the_decoders_difference_and_strength_scales_it_up_to_1(
    tmp_path, base, strength, share
):
    """Of a base that was trained, put on a fine-tuned one."""
    trained, fine_tuned = randomised(UNet(CONFIG), 4), randomised(UNet(CONFIG), 5)
    made = network(decoder=False)
    made.decoder = subtract_decoder(select_decoder(trained), select_decoder(base))
    made.save(tmp_path / "net.safetensors")
    assert read_metadata(tmp_path / "net.safetensors")["format_version"] == "2"
    wanted, start, own = decoder_of(trained), decoder_of(base), decoder_of(fine_tuned)
    stored = load_file(tmp_path / "net.safetensors")
    found = decoder_of(load(tmp_path / "net.safetensors").apply_decoder(fine_tuned, strength))
    for key, value in wanted.items():
        difference = value - start[key]
        torch.testing.assert_close(stored[f"decoder.{key}"].double(), difference)
        torch.testing.assert_close(found[key], own[key] + share * difference)


def test_without_a_strength_the_whole_difference_is_applied(whole, base):
    found, own = decoder_of(whole.apply_decoder(base)), decoder_of(base)
    for key, value in whole.decoder.items():
        torch.testing.assert_close(found[key], own[key] + value.double())


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_a_decoder_of_version_1_is_no_difference_and_replaces_the_bases(saved, base, strength):
    loaded = load(rewritten(saved, format_version="1"))
    assert loaded.decoder_is_difference is False
    found = loaded.apply_decoder(base, strength).state_dict()
    stored = load_file(saved)
    assert same(
        {f"decoder.{key}": found[key] for key in loaded.decoder},
        {key: value for key, value in stored.items() if key.startswith("decoder.")},
    )
    again = saved.with_name("again.safetensors")
    loaded.save(again)
    assert read_metadata(again)["format_version"] == "1"
    assert load(again).decoder_is_difference is False


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_decoder_of_another_type_is_applied_in_the_bases(saved, version):
    half = randomised(UNet(CONFIG), 3).half()
    found = load(rewritten(saved, format_version=version)).apply_decoder(half)
    assert {value.dtype for value in found.state_dict().values()} == {torch.float16}


def test_applying_the_decoder_shares_the_encoder_and_leaves_the_base_as_it_was():
    base = UNet(CONFIG)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    wanted = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    made = network()
    patched = made.apply_decoder(base)
    assert same(dict(base.state_dict()), before)
    assert {n: p.requires_grad for n, p in base.named_parameters()} == wanted
    frozen = base.requires_grad_(False)
    made.apply_decoder(frozen)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not any(parameter.requires_grad for parameter in patched.parameters())
    first = "input_blocks.0.0.weight"
    assert patched.state_dict()[first].data_ptr() == base.state_dict()[first].data_ptr()


# Inpainting bases


def test_an_inpainting_networks_nine_channels_read_a_reference_with_nothing_to_fill_in(tmp_path):
    """Its first convolution on (latent, mask of zeros, latent) is one of four summed channels."""
    inpainting = RetrievalControlNet(replace(CONFIG, in_channels=9), Card("paperdoll"))
    randomised(inpainting).save(tmp_path / "inpainting.safetensors")
    nine = load(tmp_path / "inpainting.safetensors", dtype=torch.float64)
    assert nine.config.in_channels == 9
    weights, first = nine.state_dict(), "encoder.input_blocks.0.0.weight"
    weights[first] = weights[first][:, :4] + weights[first][:, 5:]
    four = RetrievalControlNet(CONFIG, Card("paperdoll"), dtype=torch.float64)
    four.load_state_dict(weights)
    generator = torch.Generator().manual_seed(1)
    latents, context = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 4, 8, 6), (2, 3, 16))
    )
    with torch.no_grad():
        found, expected = (net.encode_features(latents, context) for net in (nine, four))
    assert found.keys() == expected.keys() == CONFIG.site_channels().keys()
    for site, (features, size) in expected.items():
        assert found[site][1] == size
        torch.testing.assert_close(found[site][0], features)


# Refusals


@pytest.mark.parametrize("wanted", [base for base in BASES if base != "paperdoll"])
def test_another_base_is_refused_naming_both(saved, wanted):
    message = sentence(load, saved, wanted)
    assert "'paperdoll'" in message and f"'{wanted}'" in message


def test_a_base_that_is_not_known_is_refused(saved):
    assert "'sd3'" in sentence(load, rewritten(saved, base="sd3"))
    assert "''" in sentence(load, rewritten(saved, base=None))


@pytest.mark.parametrize("version", [str(FORMAT_VERSION + 1), "999", "1.5", "-1", "", "new", None])
def test_a_newer_or_senseless_version_is_refused(saved, version):
    message = sentence(load, rewritten(saved, format_version=version))
    assert f"format version {version or 'none'}" in message and str(FORMAT_VERSION) in message


@pytest.mark.parametrize("found", ["pt", "retrieval_training_checkpoint", None])
def test_another_format_is_refused(saved, found):
    message = sentence(load, rewritten(saved, format=found))
    assert (found or "no format field") in message and "'retrieval_controlnet'" in message


def test_a_file_without_metadata_is_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    assert "no format field" in sentence(load, tmp_path / "plain.safetensors")


@pytest.mark.parametrize("key", ["encoder.time_embed.0.weight", "retrieval.middle.to_q.weight"])
def test_missing_keys_are_refused(saved, key):
    tensors = load_file(saved)
    del tensors[key]
    message = sentence(load, rewritten(saved, tensors))
    assert f"1 missing (first: {key})" in message and str(saved) in message


def test_half_a_decoder_is_refused(saved):
    tensors = load_file(saved)
    del tensors["decoder.out.2.weight"]
    message = sentence(load, rewritten(saved, tensors))
    assert "decoder of" in message and "1 missing (first: out.2.weight)" in message


@pytest.mark.parametrize("key", ["lora.up", "encoder.output_blocks.0.x", "decoder.middle_block.0"])
def test_keys_too_many_are_refused(saved, key):
    message = sentence(load, rewritten(saved, {**load_file(saved), key: torch.zeros(1)}))
    assert f"1 unexpected (first: {key.removeprefix('decoder.')})" in message


@pytest.mark.parametrize("key", ["retrieval.input_0.null_key.weight", "decoder.out.2.bias"])
def test_misshapen_keys_are_refused(saved, key):
    message = sentence(load, rewritten(saved, {**load_file(saved), key: torch.zeros(3, 1)}))
    assert f"1 misshapen (first: {key.removeprefix('decoder.')})" in message


@pytest.mark.parametrize("share", [0, 1e-5, 0.001, 0.5, 0.999])
def test_a_truncated_or_empty_file_is_refused(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    message = sentence(load, saved)
    assert "not a whole safetensors file" in message and str(saved) in message


@pytest.mark.parametrize("data", [b"\x80\x04\x95pickle", b"not a model at all, just text" * 9])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, data):
    path = tmp_path / "net.safetensors"
    path.write_bytes(data)
    assert "not a whole safetensors file" in sentence(load, path)


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    assert "is a folder" in sentence(load, tmp_path)
    assert "There is no file" in sentence(load, tmp_path / "nowhere.safetensors")
    assert "There is no file" in sentence(load, tmp_path / "no" / "where.safetensors")
    sentence(load, tmp_path / ("long" * 100))


@pytest.mark.parametrize("field", ["config", "recommended", "training"])
@pytest.mark.parametrize("text", ['{"model_channels": 32,', "[1, 2]", "", None])
def test_broken_json_is_refused(saved, field, text):
    message = sentence(load, rewritten(saved, **{field: text}))
    assert f"'{field}'" in message and "JSON" in message


@pytest.mark.parametrize(
    "change", [{"model_channels": "32"}, {"channel_mult": 2}, {"num_heads": 4}, {"new": 1}]
)
def test_a_senseless_configuration_is_refused(saved, change):
    sentence(load, rewritten(saved, config=json.dumps({**asdict(CONFIG), **change})))


def test_another_configuration_than_the_weights_have_is_refused(saved):
    config = json.dumps({**asdict(CONFIG), "context_dim": 24})
    assert "misshapen" in sentence(load, rewritten(saved, config=config))


@pytest.mark.parametrize(
    "text", ['{"strength": "much"}', '{"strength": NaN}', '{"guidance": "all"}', '{"strength": []}']
)
def test_senseless_recommendations_are_refused(saved, text):
    assert "recommends" in sentence(load, rewritten(saved, recommended=text))


# Writing


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, whole):
    (tmp_path / "file").write_text("in the way")
    message = sentence(whole.save, tmp_path / "file" / "net.safetensors")
    assert "Could not write" in message and "net.safetensors" in message
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc here")
def test_a_place_that_takes_no_files_is_refused(whole):
    assert "Could not write" in sentence(whole.save, "/proc/net.safetensors")


def test_a_folder_in_the_files_place_is_refused_and_stays(tmp_path, whole):
    (tmp_path / "net.safetensors" / "inner").mkdir(parents=True)
    assert "Could not write" in sentence(whole.save, tmp_path / "net.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    assert (tmp_path / "net.safetensors" / "inner").is_dir()


def test_missing_folders_are_made(tmp_path, whole):
    whole.save(tmp_path / "a" / "b" / "net.safetensors")
    assert load(tmp_path / "a" / "b" / "net.safetensors").card == whole.card


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_other(saved, error):
    before = saved.read_bytes()

    def write(temporary):
        temporary.write_bytes(before[: len(before) // 2])
        raise error

    if isinstance(error, OSError):
        assert "No space left on device" in sentence(atomic_write, saved, write)
    else:
        with pytest.raises(KeyboardInterrupt):
            atomic_write(saved, write)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_safetensors_own_errors_on_writing_are_told_in_one_sentence(saved, whole, monkeypatch):
    before = saved.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise files.SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(files.safetensors.torch, "save_file", full)
    assert "No space left" in sentence(whole.save, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_the_old_file_is_whole_until_the_new_one_is(saved):
    before = saved.read_bytes()
    seen = []

    def write(temporary):
        assert temporary.parent == saved.parent and temporary != saved
        seen.append(saved.read_bytes())
        temporary.write_bytes(b"new")

    atomic_write(saved, write)
    assert seen == [before] and saved.read_bytes() == b"new"


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_files_are_as_readable_as_the_users_mask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "ä")
        assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "ä"


def test_views_are_saved_as_what_they_show(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    save_safetensors(tmp_path / "v.safetensors", {"t": whole.T, "row": whole[1]}, {})
    found = load_file(tmp_path / "v.safetensors")
    assert torch.equal(found["t"], whole.T) and torch.equal(found["row"], whole[1])


# Masks of references


def test_a_mask_that_selects_nothing_is_refused():
    made = network(decoder=False)
    latents, context = torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 16)
    masks = [torch.ones(64, 64), torch.zeros(64, 64)]
    message = sentence(encode_references, made, latents, context, masks=masks)
    assert "mask of reference 2 of 2 selects nothing" in message
