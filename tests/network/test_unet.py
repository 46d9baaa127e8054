"""The U-Net family: the original checkpoints' shapes and names, and the arithmetic written out."""

from dataclasses import asdict, replace

import pytest
import torch
from plain_unet import PlainUNet, plain_embedding
from refusal import sentence
from torch import nn

from retrieval_core.network import unet as unet_module
from retrieval_core.network.unet import (
    SD15,
    SDXL,
    UNet,
    UNetConfig,
    attention,
    detect_config,
    load_strictly,
    timestep_embedding,
)

SD21 = UNetConfig(
    320, (1, 2, 4, 4), (2, 2, 2, 2), (1, 1, 1, 0), 1, 1024, num_head_channels=64,
    use_linear_in_transformer=True,
)  # fmt: skip
# The three members of the family, small: 8 heads' relative with convolutions around its
# transformers; linear projections and heads of a fixed width; a vector conditioning, no attention
# on the first level and two blocks behind each other.
LIKE_SD1 = UNetConfig(32, (1, 2, 2), (1, 2, 1), (1, 1, 0), 1, 24, num_heads=4)
LIKE_SD2 = UNetConfig(
    32, (1, 2), (2, 1), (1, 0), 1, 24, num_head_channels=16, use_linear_in_transformer=True
)
LIKE_SDXL = UNetConfig(
    32, (1, 2), (1, 2), (0, 2), 2, 24, 5, 3, num_head_channels=16, use_linear_in_transformer=True,
    adm_in_channels=12,
)  # fmt: skip
TINY = {"sd1": LIKE_SD1, "sd2": LIKE_SD2, "sdxl": LIKE_SDXL}

# Names and shapes of tensors in v1-5-pruned.safetensors and sd_xl_base_1.0.safetensors.
SD15_KEYS = {
    "time_embed.0.weight": (1280, 320),
    "time_embed.2.bias": (1280,),
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    "input_blocks.1.0.in_layers.0.weight": (320,),
    "input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
    "input_blocks.1.0.emb_layers.1.weight": (320, 1280),
    "input_blocks.1.0.out_layers.0.bias": (320,),
    "input_blocks.1.0.out_layers.3.weight": (320, 320, 3, 3),
    "input_blocks.1.1.norm.weight": (320,),
    "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (320, 320),
    "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.bias": (320,),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
    "input_blocks.1.1.transformer_blocks.0.ff.net.2.weight": (320, 1280),
    "input_blocks.1.1.transformer_blocks.0.norm3.bias": (320,),
    "input_blocks.1.1.proj_out.weight": (320, 320, 1, 1),
    "input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "input_blocks.4.1.transformer_blocks.0.attn2.to_v.weight": (640, 768),
    "input_blocks.6.0.op.bias": (640,),
    "input_blocks.7.0.in_layers.2.weight": (1280, 640, 3, 3),
    "input_blocks.9.0.op.weight": (1280, 1280, 3, 3),
    "input_blocks.11.0.out_layers.3.bias": (1280,),
    "middle_block.0.in_layers.2.weight": (1280, 1280, 3, 3),
    "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
    "middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
    "output_blocks.0.0.in_layers.0.weight": (2560,),
    "output_blocks.0.0.skip_connection.weight": (1280, 2560, 1, 1),
    "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.3.1.proj_in.weight": (1280, 1280, 1, 1),
    "output_blocks.5.0.in_layers.2.weight": (1280, 1920, 3, 3),
    "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.6.0.skip_connection.weight": (640, 1920, 1, 1),
    "output_blocks.8.2.conv.weight": (640, 640, 3, 3),
    "output_blocks.9.0.in_layers.0.weight": (960,),
    "output_blocks.11.0.in_layers.2.weight": (320, 640, 3, 3),
    "output_blocks.11.1.transformer_blocks.0.attn1.to_v.weight": (320, 320),
    "out.0.weight": (320,),
    "out.2.weight": (4, 320, 3, 3),
    "out.2.bias": (4,),
}
SDXL_KEYS = {
    "label_emb.0.0.weight": (1280, 2816),
    "label_emb.0.2.bias": (1280,),
    "input_blocks.2.0.out_layers.3.weight": (320, 320, 3, 3),
    "input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "input_blocks.4.1.proj_in.weight": (640, 640),
    "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
    "input_blocks.5.1.transformer_blocks.1.norm2.weight": (640,),
    "input_blocks.7.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
    "input_blocks.8.1.proj_out.bias": (1280,),
    "middle_block.1.transformer_blocks.9.attn1.to_out.0.weight": (1280, 1280),
    "output_blocks.0.0.in_layers.2.weight": (1280, 2560, 3, 3),
    "output_blocks.2.1.transformer_blocks.9.norm1.weight": (1280,),
    "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.3.0.skip_connection.weight": (640, 1920, 1, 1),
    "output_blocks.5.2.conv.bias": (640,),
    "output_blocks.6.0.in_layers.2.weight": (320, 960, 3, 3),
    "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
    "out.2.weight": (4, 320, 3, 3),
}
# preset -> number of tensors and of parameters in the published U-Net, and of retrieval sites.
PRESETS = {
    "sd15": (SD15, 686, 859_520_964, 13),
    "sd21": (SD21, 686, 865_910_724, 13),
    "sdxl": (SDXL, 1680, 2_567_463_684, 10),
}


def shapes(config):
    with torch.device("meta"):
        return UNet(config).state_dict()


def tiny(name, seed=0):
    """A U-Net whose weights are all at random, norms and zero convolutions too."""
    generator = torch.Generator().manual_seed(seed)
    made = UNet(TINY[name], dtype=torch.float64)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * (0.2 if parameter.ndim > 1 else 0.5))
    return made.eval().requires_grad_(False)


def inputs(config, size=(8, 8), batch=2):
    generator = torch.Generator().manual_seed(9)

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    y = None if config.adm_in_channels is None else noise(batch, config.adm_in_channels)
    x, context = noise(batch, config.in_channels, *size), noise(batch, 5, config.context_dim)
    return x, torch.tensor([7, 981][:batch]), context, y


# Layout


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_models_size_and_are_read_off_their_own_shapes(name):
    config, tensors, parameters, sites = PRESETS[name]
    weights = shapes(config)
    assert len(weights) == tensors
    assert sum(tensor.numel() for tensor in weights.values()) == parameters
    assert detect_config(weights) == config
    assert len(config.site_channels()) == sites
    assert UNetConfig.from_dict(asdict(config)) == config


@pytest.mark.parametrize(("config", "keys"), [(SD15, SD15_KEYS), (SDXL, SDXL_KEYS)])
def test_known_keys_have_their_published_names_and_shapes(config, keys):
    weights = shapes(config)
    assert {key: tuple(weights[key].shape) for key in keys if key in weights} == keys


def test_sdxl_has_no_attention_on_its_first_level():
    names = shapes(SDXL)
    for block in ("input_blocks.1", "input_blocks.2", "output_blocks.6", "output_blocks.8"):
        assert not any(name.startswith(block + ".1.") for name in names)


def test_inpainting_models_are_of_the_family_too():
    config = replace(SD15, in_channels=9)
    assert detect_config(shapes(config)) == config


def test_sites_of_sd15_are_twelve_skips_and_the_middle():
    widths = [320] * 4 + [640] * 3 + [1280] * 6
    assert list(SD15.site_channels().values()) == widths
    factors = [1] * 3 + [2] * 3 + [4] * 3 + [8] * 4
    assert list(SD15.site_downsampling().values()) == factors
    assert list(SD15.site_channels()) == [f"input_{i}" for i in range(12)] + ["middle"]


# Arithmetic


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 12)])
@pytest.mark.parametrize("name", TINY)
def test_prediction_equals_the_plain_formulation(monkeypatch, name, size):
    # The pack's embedding is made in float32, as the original is; it has its own test below.
    monkeypatch.setattr(unet_module, "timestep_embedding", plain_embedding)
    model, config = tiny(name), TINY[name]
    x, steps, context, y = inputs(config, size)
    expected = PlainUNet(model.state_dict(), config.heads)(x, steps, context, y)
    found = model(x, steps, context, y)
    assert found.shape == (2, config.out_channels, *size)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_what_a_hook_adds_is_added_where_the_plain_formulation_adds_it(monkeypatch, name):
    monkeypatch.setattr(unet_module, "timestep_embedding", plain_embedding)
    model, config = tiny(name), TINY[name]
    x, steps, context, y = inputs(config)
    seen = {}
    model(x, steps, context, y, lambda site, h: seen.setdefault(site, h))
    generator = torch.Generator().manual_seed(4)
    add = {
        site: torch.randn(h.shape, generator=generator, dtype=h.dtype) for site, h in seen.items()
    }
    found = model(x, steps, context, y, lambda site, h: h + add[site])
    expected = PlainUNet(model.state_dict(), config.heads)(x, steps, context, y, add)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dim", [32, 320])
def test_timestep_embedding_within_float32(dim):
    steps = torch.tensor([0, 1, 250, 999])
    found = timestep_embedding(steps, dim)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), plain_embedding(steps, dim), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_the_hook_sees_every_site_once_with_its_width_and_size(name):
    model, config = tiny(name), TINY[name]
    x, steps, context, y = inputs(config, (7, 10))
    seen = []

    def hook(site, h):
        seen.append((site, tuple(h.shape)))
        return h

    hooked, plain = model(x, steps, context, y, hook), model(x, steps, context, y)
    assert torch.equal(hooked, plain)
    factors = config.site_downsampling()
    expected = {
        site: (2, width, -(-7 // factors[site]), -(-10 // factors[site]))
        for site, width in config.site_channels().items()
    }
    assert len(seen) == len(expected) and dict(seen) == expected
    assert [site for site, _ in seen] == list(expected)[::-1]


def test_attention_with_a_mask_equals_the_formula():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 12, generator=generator).double() for n in (3, 5, 5))
    mask = torch.randn(2, 1, 1, 5, generator=generator).double()
    mask[0, 0, 0, 2] = -torch.inf
    found = attention(q, k, v, 3, mask)
    for row in range(2):
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            shares = torch.softmax(q[row, :, part] @ k[row, :, part].T / 2 + mask[row, 0], 1)
            torch.testing.assert_close(found[row, :, part], shares @ v[row, :, part])


@pytest.mark.parametrize("mask", [None, torch.tensor([0.0, -1.0, float("-inf"), 0.5])])
def test_attention_that_trains_in_bfloat16_is_the_same(mask):
    """Short attention takes another way there; value and gradients agree to its 8 bits."""
    drawn = [torch.randn(2, n, 12, generator=torch.Generator().manual_seed(n)) for n in (5, 4)]

    def run(dtype):
        q, kv = (t.detach().clone().to(dtype).requires_grad_() for t in drawn)
        bias = None if mask is None else mask.to(dtype)[None, None, None]
        out = attention(q, kv, kv * 0.5, 3, bias)
        out.square().sum().backward()
        assert out.dtype == dtype
        return [t.float() for t in (out, q.grad, kv.grad)]

    for ours, exact in zip(run(torch.bfloat16), run(torch.float32), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0.03, atol=0.03)


# Injection of layers and attention


def test_every_layer_comes_from_the_operations_and_attention_is_the_one_injected():
    class Operations:
        class Linear(nn.Linear):
            pass

        class Conv2d(nn.Conv2d):
            pass

        class GroupNorm(nn.GroupNorm):
            pass

        class LayerNorm(nn.LayerNorm):
            pass

    calls = []

    def attend(q, k, v, heads, mask=None):
        calls.append(heads)
        return attention(q, k, v, heads, mask)

    plain = tiny("sdxl")
    model = UNet(LIKE_SDXL, Operations, attend, dtype=torch.float64)
    model.load_state_dict(plain.state_dict())
    model.requires_grad_(False)  # other kernels may run where a gradient is wanted
    own = tuple(vars(Operations)[name] for name in ("Linear", "Conv2d", "GroupNorm", "LayerNorm"))
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            assert isinstance(module, own), name
    x, steps, context, y = inputs(LIKE_SDXL)
    assert torch.equal(model(x, steps, context, y), plain(x, steps, context, y))
    blocks = sum(name.endswith("attn1") for name, _ in model.named_modules())
    assert calls == [4] * (2 * blocks)


# Refusals


def test_missing_extra_and_misshapen_keys_are_refused():
    model = tiny("sd1")
    good = model.state_dict()

    def refusal(weights):
        return sentence(load_strictly, model, weights, "U-Net")

    missing = {k: v for k, v in good.items() if k != "middle_block.2.out_layers.0.bias"}
    message = refusal(missing)
    assert "1 missing (first: middle_block.2.out_layers.0.bias)" in message
    message = refusal({**good, "control_model.x": torch.zeros(1)})
    assert "1 unexpected (first: control_model.x)" in message
    message = refusal({**good, "out.2.bias": torch.zeros(9)})
    assert "1 misshapen (first: out.2.bias)" in message
    both = {**missing, "a": torch.zeros(1), "out.2.bias": torch.zeros(9)}
    message = refusal(both)
    assert all(word in message for word in ("1 missing", "1 unexpected", "1 misshapen"))


def test_a_refused_file_changes_nothing():
    model, other = tiny("sd1"), tiny("sd1", seed=1).state_dict()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other.pop("out.2.bias")
    sentence(load_strictly, model, other, "U-Net")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_weights_of_something_else_are_refused():
    assert "no 'input_blocks.0.0.weight'" in sentence(detect_config, {})
    flux = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 3)}
    assert "SD 1.x, SD 2.x or SDXL" in sentence(detect_config, flux)
    unconditional = {k: v for k, v in shapes(SD15).items() if "transformer_blocks" not in k}
    assert "no cross-attention" in sentence(detect_config, unconditional)


def test_a_vector_conditioning_must_be_given():
    model = tiny("sdxl")
    x, steps, context, _ = inputs(LIKE_SDXL)
    assert "12 values" in sentence(model, x, steps, context)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"num_res_blocks": [2, 2, 2]}, "4 levels in channel_mult but 3 in num_res_blocks"),
        ({"channel_mult": 4}, "does not make sense"),
        ({"num_heads": None}, "exactly one"),
        ({"num_head_channels": 64}, "exactly one"),
        ({"model_channels": "wide"}, "model_channels=wide"),
        ({"model_channels": -320}, "model_channels=-320"),
        ({"model_channels": 48}, "width of 48 channels"),
        ({"num_heads": 7}, "7 heads"),
        ({"transformer_depth": [1, 1, 1, 0.5]}, "transformer_depth=(1, 1, 1, 0.5)"),
        ({"dropout": 0.1}, "argument 'dropout'"),
    ],
)
def test_an_impossible_configuration_is_refused(change, shown):
    assert shown in sentence(UNetConfig.from_dict, {**asdict(SD15), **change})


def test_an_incomplete_configuration_is_refused():
    values = asdict(SD15)
    del values["context_dim"]
    assert "context_dim" in sentence(UNetConfig.from_dict, values)
