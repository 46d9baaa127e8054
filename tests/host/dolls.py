"""A paper-doll model of noise in the host: three resolutions, and small enough for many runs."""

from __future__ import annotations

import comfy.samplers
import torch
from making import core_network, images, noise, paperdoll_base
from retrieval_pack.nodes.host import encoded_references as references
from retrieval_pack.nodes.host.paperdoll_host import HostVAE, load_model, make_clip
from retrieval_pack.nodes.host.trained_network import load_network
from retrieval_pack.retrieval_core.paperdoll.model import load_base


class Dolls:
    """MODEL, CLIP, VAE and a network for them, with shorthands for what nodes do."""

    def __init__(self, folder):
        paperdoll_base(folder / "base.safetensors")
        self.base = load_base(folder / "base.safetensors")
        self.model = load_model(folder / "base.safetensors")
        self.clip, self.vae = make_clip(self.base), HostVAE(self.base.vae)
        self.path = folder / "network.safetensors"
        core_network(self.base.unet.config, "paperdoll").save(self.path)
        self.network = load_network(self.path, self.model)

    def references(self, count: int = 2, seed: int = 3, concept: str = "face", **kw):
        made = references.encode_references(
            self.network, images(count, seed=seed), self.vae, self.clip, concept, **kw
        )
        return references.References(self.network, made)

    def text(self, words: str, **more):
        return [[self.clip.encode_from_tokens(self.clip.tokenize(words)), dict(more)]]

    def sample(self, model, rows: int = 1, steps: int = 3, cfg: float = 2.0, positive=None):
        return comfy.sample.sample(
            model,
            noise(rows, 24, 16, 16),
            steps,
            cfg,
            "euler",
            "normal",
            positive or self.text("standing, smile"),
            self.text(""),
            torch.zeros(rows, 24, 16, 16),
            disable_pbar=True,
            seed=5,
        )
