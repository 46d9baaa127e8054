"""The common base of a trained network and the training-free mode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...retrieval_core.bank.bank_file import Maker
from ...retrieval_core.bank.encoding import Features
from ...retrieval_core.bank.site_bank import Bank
from ...retrieval_core.bank.token_budget import Budget
from ...retrieval_core.bank.tokens import Tokens
from ...retrieval_core.data.prepare import PreparedReference
from ...retrieval_core.network.unet import UNetConfig
from ...retrieval_core.sampling.controls import Controls
from ...retrieval_core.sampling.presets import Preset


@dataclass(eq=False)
class ReferenceNetwork(ABC):
    """The value of RETRIEVAL_CONTROLNET: a `TrainedNetwork` or a `TrainingFreeModel`.

    Attributes:
        name: for messages.
        network: the core's `RetrievalControlNet` or `TrainingFree`.
        maker: what saved references are bound to; those of equal fingerprints can be combined.
        latent_format: of the base model, which scales its VAE's latents.
        identity: key of what encoded references depend on beside the maker's fingerprint.
    """

    name: str
    network: Any
    maker: Maker
    latent_format: Any

    identity = None

    @property
    def base(self) -> str:
        return self.network.card.base

    @property
    def config(self) -> UNetConfig:
        return self.network.config

    @property
    def recommended(self) -> dict[str, Any]:
        return self.network.card.recommended

    def site_downsampling(self) -> Mapping[str, int]:
        """site -> latent pixels per position along an edge."""
        return self.config.site_downsampling()

    def __deepcopy__(self, memo: dict) -> ReferenceNetwork:
        return self

    @abstractmethod
    def encode(self, latent: Tensor, context: Tensor, pooled: Tensor | None, size: int) -> Features:
        """Encodes one reference on the host's device.

        Args:
            latent: [1, C, h, w], clean, scaled as the model's are. size: of the picture.
            context: [1, L, D] of the concept. pooled: its pooled output where the CLIP has one.
        """

    def find_subject(self, features: Features, reference: PreparedReference) -> Tensor | None:
        """The subject of a reference without a mask, bool [S, S], from its features.

        None where it is not told from a background, and for networks that leave the background
        out by themselves.
        """
        return None

    @abstractmethod
    def make_bank(self, tokens: Tokens, budget: Budget) -> Bank:
        """The bank of the tokens, on the CPU; also made there if the device is out of memory."""

    @abstractmethod
    def apply(
        self,
        model: Any,
        references: Any,
        controls: Controls,
        scale: float,
        preset: Preset,
        **acting: Any,
    ) -> Any:
        """A clone of a MODEL that retrieves from `encoded_references.References`.

        Args:
            scale: the strength divided by the recommended one.
            acting: the other arguments of `applications.Application`.
        """
