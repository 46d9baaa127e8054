"""The common interface of a trained network and the training-free mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ...retrieval_core.bank.bank_file import Maker
from ...retrieval_core.bank.site_bank import Bank
from ...retrieval_core.bank.token_budget import Budget
from ...retrieval_core.bank.tokens import EncodedReference, Tokens
from ...retrieval_core.data.prepare import PreparedReference
from ...retrieval_core.network.unet import UNetConfig
from ...retrieval_core.sampling.controls import Controls


class ReferenceNetwork(Protocol):
    """The value of RETRIEVAL_CONTROLNET.

    Attributes:
        name: for messages. base: one of `controlnet.BASES`. config: of the base's U-Net.
        recommended: strength and guidance.
        maker: what saved references are bound to; those of equal fingerprints can be combined.
        identity: key of what encoded references depend on beside the maker's fingerprint.
        latent_format: of the base model, which scales its VAE's latents.
    """

    name: str
    base: str
    config: UNetConfig
    recommended: dict[str, Any]
    maker: Maker
    identity: Any
    latent_format: Any

    def encode(
        self,
        prepared: Sequence[PreparedReference],
        context: Tensor,
        pooled: Tensor | None,
        latents: Tensor,
        concept: str,
        size: int,
    ) -> list[EncodedReference]:
        """Encodes a batch of references on the host's device, to the CPU.

        Args:
            context: [1, L, D] of the concept. pooled: its pooled output where the CLIP has one.
            latents: [R, C, h, w], clean, scaled as the model's are. size: of the pictures.
        """
        ...

    def make_bank(self, tokens: Tokens, budget: Budget) -> Bank:
        """The bank of the tokens, on the CPU."""
        ...

    def apply(
        self, model: Any, references: Any, controls: Controls, scale: float, **acting: Any
    ) -> Any:
        """A clone of a MODEL that retrieves from `encoded_references.References`.

        Args:
            scale: the strength divided by the recommended one.
            acting: the other arguments of `applications.Application`.
        """
        ...
