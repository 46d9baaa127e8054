"""Small models of true architecture, and stand-ins for CLIP and VAE, made of seeded noise."""

from __future__ import annotations

import types
import uuid

import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from lazy_layers import give_weights
from retrieval_pack.nodes.host import encoded_references as references
from retrieval_pack.nodes.host import trained_network
from retrieval_pack.nodes.host.reference_network import ReferenceNetwork
from retrieval_pack.retrieval_core.network.controlnet import (
    Card,
    RetrievalControlNet,
    select_decoder,
)
from retrieval_pack.retrieval_core.network.unet import UNet, UNetConfig
from retrieval_pack.retrieval_core.paperdoll import bundle
from retrieval_pack.retrieval_core.paperdoll.model import PaperdollModel

SD15 = UNetConfig(320, (1, 2), (1, 1), (1, 0), 1, 768, num_heads=8)
TINY_SD15 = UNetConfig(320, (1,), (1,), (1,), 1, 768, num_heads=8)
TINY_SD21 = UNetConfig(
    320, (1,), (1,), (1,), 1, 1024, num_head_channels=64, use_linear_in_transformer=True
)
PREFIX = "model.diffusion_model."


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights that keep activations near 1, and no zero anywhere (zero convolutions included)."""
    generator = torch.Generator().manual_seed(seed)
    give_weights(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                drawn *= parameter[0].numel() ** -0.5
            elif name.endswith("weight"):  # norms
                drawn = 1 + 0.1 * drawn
            else:
                drawn *= 0.1
            parameter.copy_(drawn)
    return module.eval().requires_grad_(False)


def checkpoint(config: UNetConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint's U-Net in the original layout."""
    return {PREFIX + k: v.clone() for k, v in randomised(UNet(config), seed).state_dict().items()}


def model_from(weights: dict[str, torch.Tensor]):
    """A MODEL by the host's own detection and loading."""
    own = {k[len(PREFIX) :]: v.clone() for k, v in weights.items()}
    return comfy.sd.load_diffusion_model_state_dict(own)


def core_network(
    config: UNetConfig, base: str, seed: int = 1, decoder: bool = False
) -> RetrievalControlNet:
    made = randomised(RetrievalControlNet(config, Card(base)), seed)
    if decoder:
        made.decoder = {
            k: v.clone() for k, v in select_decoder(randomised(UNet(config), seed + 50)).items()
        }
    return made


def loaded(tmp_path, model, config: UNetConfig, base: str, **kw) -> trained_network.TrainedNetwork:
    """The network saved to a file and loaded for a model as the node does."""
    path = tmp_path / f"{base}_{uuid.uuid4().hex[:6]}.safetensors"
    core_network(config, base, **kw).save(path)
    return trained_network.load_network(path, model)


class FakeCLIP:
    """Text to seeded noise of a given width."""

    def __init__(self, width: int = 768, pooled: int | None = None, tokens: int = 7):
        self.width, self.pooled, self.tokens, self.layer_idx = width, pooled, tokens, None
        self.patcher = types.SimpleNamespace(model=torch.nn.Identity(), patches_uuid=uuid.uuid4())
        self.calls = 0

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens(self, tokens: str, return_pooled: bool = False):
        self.calls += 1
        seed = sum(map(ord, tokens))
        pooled = None if self.pooled is None else noise(1, self.pooled, seed=seed)
        return noise(1, self.tokens, self.width, seed=seed), pooled


class FakeVAE:
    """Averages of 8 x 8 pixels as latents of any number of channels."""

    def __init__(self, channels: int = 4):
        self.channels, self.calls = channels, 0
        self.patcher = types.SimpleNamespace(model=torch.nn.Identity(), patches_uuid=uuid.uuid4())

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8) * 8
        return small.repeat(1, 4, 1, 1)[:, : self.channels]


def images(count: int, size: int = 64, seed: int = 3) -> torch.Tensor:
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def encoded(net: ReferenceNetwork, count: int = 1, seed: int = 3, **kw) -> references.References:
    kw.setdefault("vae", FakeVAE())
    kw.setdefault("clip", FakeCLIP(net.config.context_dim))
    kw.setdefault("size", 64)
    kw.setdefault("automatic", False)  # noise has no subject
    made = references.encode_references(net, images(count, seed=seed), concept="figure", **kw)
    return references.References(net, made)


def conditioning(seed: int, width: int = 768, **more):
    return [[noise(1, 7, width, seed=seed), dict(more)]]


def sample(
    model,
    latent: torch.Tensor | None = None,
    cfg: float = 3.0,
    steps: int = 3,
    positive=None,
    negative=None,
    sampler: str = "euler",
    seed: int = 5,
    width: int = 768,
    **kw,
) -> torch.Tensor:
    """The host's own sampling, as KSampler calls it."""
    latent = torch.zeros(1, 4, 8, 8) if latent is None else latent
    return comfy.sample.sample(
        model,
        noise(*latent.shape, seed=seed),
        steps,
        cfg,
        sampler,
        "normal",
        positive or conditioning(10, width),
        negative or conditioning(11, width),
        latent,
        disable_pbar=True,
        seed=seed,
        **kw,
    )


def watch_loading(monkeypatch) -> list[tuple]:
    """The models and the memory of every later call of the host's `load_models_gpu`."""
    asked, original = [], management.load_models_gpu

    def spy(models, memory_required=0, **kw):
        asked.append((models, memory_required))
        return original(models, memory_required=memory_required, **kw)

    monkeypatch.setattr(management, "load_models_gpu", spy)
    return asked


def weights_of(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.model.state_dict().items()}


def same_weights(model, before: dict[str, torch.Tensor]) -> bool:
    now = model.model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)


def paperdoll_base(path) -> None:
    """A paper-doll base model's file, of noise."""
    made = randomised(PaperdollModel(), 0)
    for name, buffer in made.vae.named_buffers():
        if name == "basis":
            buffer.copy_(torch.linalg.qr(noise(48, 48))[0][: buffer.shape[0]])
    made.save(path)


def paperdoll_bundle(folder) -> None:
    """The files that the demo's nodes read, of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    paperdoll_base(folder / bundle.BASE_FILE)
    core_network(PaperdollModel().unet.config, "paperdoll").save(folder / bundle.RETRIEVAL_FILE)
