"""Load, encode, apply and sample on every base that the host detects, with weights of noise.

As few levels and as narrow as detection allows; the whole networks are marked slow.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import comfy.sd
import pytest
import torch
from making import (
    SD15,
    TINY_SD15,
    TINY_SD21,
    FakeCLIP,
    FakeVAE,
    conditioning,
    images,
    noise,
    randomised,
    sample,
)
from retrieval_pack.nodes.apply_reference_retrieval import RetrievalApplyReferences
from retrieval_pack.nodes.encode_references import RetrievalEncodeReferences
from retrieval_pack.nodes.host.base_model import detect_base
from retrieval_pack.nodes.host.trained_network import load_network
from retrieval_pack.retrieval_core.network.controlnet import (
    Card,
    RetrievalControlNet,
    select_decoder,
)
from retrieval_pack.retrieval_core.network.unet import UNet, UNetConfig

FULL_SD15 = UNetConfig(320, (1, 2, 4, 4), (2,) * 4, (1, 1, 1, 0), 1, 768, num_heads=8)
FULL_SDXL = UNetConfig(
    320,
    (1, 2, 4),
    (2, 2, 2),
    (0, 2, 10),
    10,
    2048,
    num_head_channels=64,
    use_linear_in_transformer=True,
    adm_in_channels=2816,
)
# SDXL is known by its 0, 2 and 10 transformer blocks a level; widths and the middle are free.
NARROW_SDXL = replace(FULL_SDXL, channel_mult=(1, 1, 1), middle_depth=0)
NARROW_VEGA = replace(NARROW_SDXL, transformer_depth=(0, 1, 2))


@dataclass(frozen=True)
class Base:
    """A base model of the tests: what it is, and the host's class for it."""

    name: str
    config: UNetConfig
    kind: str = "BaseModel"
    decoder: bool = True
    dtype: torch.dtype = torch.float32
    inpainting: bool = False

    @property
    def own_config(self) -> UNetConfig:
        """Of the base's own U-Net: inpainting adds the mask and the masked image to its input."""
        return replace(self.config, in_channels=9) if self.inpainting else self.config


BASES = {
    "sd15": Base("sd15", SD15),
    "sd15 inpainting": Base("sd15", TINY_SD15, inpainting=True),
    "sd21": Base("sd21", TINY_SD21),
    "sdxl": Base("sdxl", NARROW_SDXL, "SDXL"),
    "sdxl inpainting, fewer blocks": Base("sdxl", NARROW_VEGA, "SDXL", inpainting=True),
    "sd15 full": Base("sd15", FULL_SD15),
    "sdxl full": Base("sdxl", FULL_SDXL, "SDXL", decoder=False, dtype=torch.float16),
}


def unmade(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Noise for a module made on the meta device: torch's own initialisation would take longer."""
    return randomised(module.to_empty(device="cpu"), seed)


def model_of(base: Base):
    weights = unmade(UNet(base.own_config, device="meta", dtype=base.dtype), 0).state_dict()
    options = {} if base.dtype == torch.float32 else {"dtype": base.dtype}
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options=options)


def network_of(base: Base, model, folder):
    made = RetrievalControlNet(base.config, Card(base.name), device="meta", dtype=base.dtype)
    unmade(made, 1)
    if base.decoder:
        trained = unmade(UNet(base.config, device="meta", dtype=base.dtype), 2)
        made.decoder = select_decoder(trained)
    path = folder / "network.safetensors"
    made.save(path)
    del made
    return load_network(path, model)


def digest(model) -> dict[str, int]:
    """Of the bytes of every weight."""
    state = model.model.state_dict()
    return {k: zlib.crc32(v.flatten().view(torch.uint8).numpy()) for k, v in state.items()}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "full" in n else ()) for n in BASES]
)
def test_load_encode_apply_sample(name, tmp_path):
    base = BASES[name]
    model = model_of(base)
    assert type(model.model).__name__ == base.kind
    assert detect_base(model).name == base.name
    assert detect_base(model).config == base.own_config
    net = network_of(base, model, tmp_path)
    width, pooled = base.config.context_dim, 1280 if base.kind == "SDXL" else None
    references, _ = RetrievalEncodeReferences.execute(
        net, images(2), FakeVAE(), FakeCLIP(width, pooled), {"concept": "figure"}, 1.0, 64
    ).args
    assert list(references.encoded[0].tokens) == list(base.config.site_channels())
    assert all(read.isfinite().all() for read in references.encoded[0].tokens.values())

    vector = {} if pooled is None else {"pooled_output": noise(1, pooled)}
    texts = {
        "positive": conditioning(10, width, **vector),
        "negative": conditioning(11, width, **vector),
        "steps": 2,
    }

    def pictures(strength: float):
        (patched,) = RetrievalApplyReferences.execute(
            model, references, strength, 0.0, 1.0, "recommended"
        ).args
        return sample(patched, **texts)

    before, plain = digest(model), sample(model, **texts)
    with_references = pictures(1.0)
    assert with_references.isfinite().all() and not torch.equal(with_references, plain)
    assert torch.equal(pictures(0.0), plain)
    assert torch.equal(sample(model, **texts), plain)
    assert digest(model) == before
