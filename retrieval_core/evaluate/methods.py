"""What draws the pictures; `comfy.py` has the method that asks a running ComfyUI."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..bank.bank_file import fingerprint
from ..data.prepare import PreparedReference
from ..errors import RetrievalError
from ..network.unet import UNet
from ..paperdoll.bundle import Bundle
from ..paperdoll.generate import Sampling, stacked
from ..paperdoll.measure_training_free import side_by_side
from ..paperdoll.model import PaperdollModel
from ..sampling.applications import Retrieval
from ..sampling.sampler import guided_denoiser, sample
from ..training_free import JointRetrieval, TrainingFree, layer_modules
from .characters import Character
from .protocol import Run

BATCH = 8


class Method(Protocol):
    """One way to draw characters from references.

    Attributes:
        name: of its curve. weights: the settings of its strength; (None,) where it has none.
        digest: changes with whatever changes its pictures, beside the weight.
        batch: runs that are best drawn together.
    """

    name: str
    weights: Sequence[float | None]
    digest: str
    batch: int

    def draw(
        self, runs: Sequence[Run], characters: Mapping[str, Character], weight: float | None
    ) -> list[Tensor]:
        """The pictures [samples, 3, H, W] in 0..1 of each run."""
        ...


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
        made_by = "".join((fingerprint(base), about, settings))
        self.digest = hashlib.sha256(made_by.encode()).hexdigest()[:16]

    @abstractmethod
    def retrieval(self, groups: Sequence[Sequence[PreparedReference]], weight: float) -> Retrieval:
        """What is injected for one group of references a row."""

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
            unet, retrieval = self.base.unet, None
            if weight:
                groups = [characters[run.character].references for run, _ in rows]
                unet, retrieval = self.unet(), self.retrieval(groups, weight)
            cond, uncond = text.encode(prompts), text.encode([""] * len(prompts))
            schedule, how = self.base.schedule, self.how
            denoise = guided_denoiser(unet, schedule, cond, uncond, how.cfg, retrieval)
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
        about = fingerprint(bundle.network)
        for key, weight in sorted(bundle.network.decoder.items()):
            about += f"{key} {weight.flatten()[:: max(1, weight.numel() // 64)].tolist()}"
        super().__init__(bundle.base, weights, how, name, about)

    def unet(self) -> UNet:
        return self.network.apply_decoder(self.base.unet)

    def retrieval(self, groups: Sequence[Sequence[PreparedReference]], weight: float) -> Retrieval:
        guidance = self.how.guidance or self.network.card.recommended["guidance"]
        bank = self.network.project(stacked(self.base, self.network, groups))
        return Retrieval(self.network.retrieval, bank, weight, end=self.how.end, guidance=guidance)


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

    def retrieval(self, groups: Sequence[Sequence[PreparedReference]], weight: float) -> Retrieval:
        guidance = self.how.guidance or self.network.card.recommended["guidance"]
        return JointRetrieval(
            layer_modules(self.base.unet),
            side_by_side(self.base, self.network, groups),
            weight,
            end=self.how.end,
            guidance=guidance,
            timesteps=self.network.timesteps(),
            adain=self.network.adain,
        )


def check_names(methods: Sequence[Method]) -> None:
    """RetrievalError if two methods have one name."""
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise RetrievalError(f"Two methods are called '{name}'; give each a name of its own.")
