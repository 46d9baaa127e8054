"""Both modes of retrieval on the paper-doll base model as methods of an evaluation."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..bank.site_bank import make_network_bank
from ..data.prepare import PreparedReference
from ..evaluate.characters import Character
from ..evaluate.protocol import Run
from ..network.fingerprint import fingerprint_weights
from ..network.unet import UNet
from ..sampling.applications import Application, Retrieval
from ..sampling.frozen_site import freeze_sites
from ..sampling.sampler import make_guided_denoiser, sample
from ..training_free import JointRetrieval, TrainingFree, name_layers
from .bundle import Bundle
from .generate import Sampling, encode_groups
from .measure_training_free import make_banks
from .model import PaperdollModel

BATCH = 8


class PaperdollMethod(ABC):
    """A method of the core on the paper-doll base model; weight 0 is no retrieval.

    A picture's noise depends on its seed and sample only, so methods and weights are compared on
    the same noise.
    """

    batch = BATCH

    def __init__(
        self, base: PaperdollModel, weights: Sequence[float], how: Sampling, name: str, about: str
    ):
        self.base, self.weights, self.how, self.name = base, tuple(weights), how, name
        settings = json.dumps([how.steps, how.cfg, how.sampler, how.guidance, how.end])
        made_by = "".join((fingerprint_weights(base.state_dict()), about, settings))
        self.digest = hashlib.sha256(made_by.encode()).hexdigest()[:16]

    @abstractmethod
    def apply(self, groups: Sequence[Sequence[PreparedReference]], weight: float) -> Application:
        """One group of references a row, applied."""

    def unet(self) -> UNet:
        """The U-Net that draws while retrieval is on."""
        return self.base.unet

    def draw(
        self, runs: Sequence[Run], characters: Mapping[str, Character], weight: float | None
    ) -> list[Tensor]:
        rows = [(run, sample) for run in runs for sample in range(run.samples)]
        prompts, text = [run.prompt for run, _ in rows], self.base.text
        noise = torch.cat([self.noise(run.seed, number) for run, number in rows])
        with torch.inference_mode():
            unet, applied = self.base.unet, []
            if weight:
                groups = [characters[run.character].references for run, _ in rows]
                unet, applied = self.unet(), [self.apply(groups, weight)]
            cond, uncond = text.encode(prompts), text.encode([""] * len(prompts))
            schedule, how = self.base.schedule, self.how
            denoise = make_guided_denoiser(unet, schedule, cond, uncond, how.cfg, applied)
            latents = sample(denoise, noise, schedule, how.steps, how.sampler)
            pictures = self.base.vae.decode(latents)
        return list(pictures.split([run.samples for run in runs]))

    def noise(self, seed: int, sample: int) -> Tensor:
        """Unit noise of one picture."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + sample)
        return self.base.noise(1, generator)


class TrainedMethod(PaperdollMethod):
    """The bundled (or another) retrieval network."""

    def __init__(
        self, bundle: Bundle, weights: Sequence[float], how: Sampling, name: str = "trained"
    ):
        self.network = bundle.network
        about = fingerprint_weights(bundle.network.state_dict())
        for key, weight in sorted(bundle.network.decoder.items()):
            about += f"{key} {weight.flatten()[:: max(1, weight.numel() // 64)].tolist()}"
        super().__init__(bundle.base, weights, how, name, about)

    def unet(self) -> UNet:
        return self.network.apply_decoder(self.base.unet)

    def apply(self, groups: Sequence[Sequence[PreparedReference]], weight: float) -> Application:
        guidance = self.how.guidance or self.network.card.recommended["guidance"]
        bank = make_network_bank(self.network, encode_groups(self.base, self.network, groups))
        sites = freeze_sites(self.network)
        return Retrieval(bank, weight, end=self.how.end, guidance=guidance, sites=sites)


class TrainingFreeMethod(PaperdollMethod):
    """The base model as its own retrieval network; the weight is the fidelity."""

    def __init__(
        self,
        base: PaperdollModel,
        weights: Sequence[float],
        how: Sampling,
        name: str = "training-free",
    ):
        self.network = TrainingFree.of(base.unet, "paperdoll")
        super().__init__(base, weights, how, name, self.network.fingerprint)

    def apply(self, groups: Sequence[Sequence[PreparedReference]], weight: float) -> Application:
        guidance = self.how.guidance or self.network.card.recommended["guidance"]
        return JointRetrieval(
            make_banks(self.base, self.network, groups),
            weight,
            end=self.how.end,
            guidance=guidance,
            names=name_layers(self.base.unet),
            timesteps=self.network.timesteps(),
            adain=self.network.adain,
        )
