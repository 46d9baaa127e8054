"""Both modes of retrieval on the paper-doll base model as methods of an evaluation."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..data.prepare import PreparedReference
from ..evaluate.characters import Character
from ..evaluate.protocol import Run
from ..network.fingerprint import fingerprint_weights
from ..network.unet import UNet
from ..sampling.applications import Application
from ..sampling.presets import PRESETS
from ..training_free import TrainingFree
from .bundle import Bundle
from .generate import (
    Sampling,
    apply_bank,
    apply_training_free,
    draw_noise,
    encode_groups,
    sample_pictures,
)
from .model import PaperdollModel


class PaperdollMethod(ABC):
    """A method of the core on the paper-doll base model; weight 0 is no retrieval.

    A picture's noise depends on its seed and sample only, so that all methods and weights start
    from the same noise.
    """

    batch = 8

    def __init__(
        self, base: PaperdollModel, weights: Sequence[float], how: Sampling, name: str, about: str
    ):
        self.base, self.weights, self.how, self.name = base, tuple(weights), how, name
        settings = json.dumps([how.steps, how.cfg, how.sampler, how.guidance, how.end])
        made_by = "".join((fingerprint_weights(base.state_dict()), about, settings))
        self.digest = hashlib.sha256(made_by.encode()).hexdigest()[:16]

    @abstractmethod
    def apply(self, groups: Sequence[Sequence[PreparedReference]], weight: float) -> Application:
        """Retrieval from one group of references per row."""

    def unet(self) -> UNet:
        """The U-Net to sample with while retrieval is on."""
        return self.base.unet

    def draw(
        self, runs: Sequence[Run], characters: Mapping[str, Character], weight: float | None
    ) -> list[Tensor]:
        rows = [(run, sample) for run in runs for sample in range(run.samples)]
        prompts = [run.prompt for run, _ in rows]
        noise = torch.cat([draw_noise(self.base, run.seed, number) for run, number in rows])
        with torch.inference_mode():
            unet, applied = self.base.unet, []
            if weight:
                groups = [characters[run.character].references for run, _ in rows]
                unet, applied = self.unet(), [self.apply(groups, weight)]
            pictures = sample_pictures(self.base, unet, prompts, noise, applied, self.how)
        return list(pictures.split([run.samples for run in runs]))


class TrainedMethod(PaperdollMethod):
    """The bundled (or another) retrieval network."""

    def __init__(
        self, bundle: Bundle, weights: Sequence[float], how: Sampling, name: str = "trained"
    ):
        self.network = bundle.network
        made_of = (bundle.network.state_dict(), bundle.network.decoder)
        about = "".join(map(fingerprint_weights, made_of))
        super().__init__(bundle.base, weights, how, name, about)

    def unet(self) -> UNet:
        return self.network.apply_decoder(self.base.unet)

    def apply(self, groups: Sequence[Sequence[PreparedReference]], weight: float) -> Application:
        tokens = encode_groups(self.base, self.network, groups)
        return apply_bank(self.network, tokens, replace(self.how, strength=weight))


class TrainingFreeMethod(PaperdollMethod):
    """The training-free mode; the weight is its strength."""

    def __init__(self, base: PaperdollModel, weights: Sequence[float], how: Sampling):
        self.network = TrainingFree.from_unet(base.unet, "paperdoll")
        super().__init__(base, weights, how, "training-free", self.network.fingerprint)

    def apply(self, groups: Sequence[Sequence[PreparedReference]], weight: float) -> Application:
        guidance = self.how.guidance or self.network.card.recommended["guidance"]
        preset = PRESETS[self.how.preset]
        return apply_training_free(
            self.base, self.network, groups, weight, guidance, self.how.end, preset
        )
