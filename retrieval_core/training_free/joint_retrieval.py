"""The application of a training-free bank to a U-Net of the core."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..bank.site_bank import SiteBank
from ..errors import RetrievalError
from ..network.unet import Attention
from ..sampling.applications import Application
from ..sampling.joint_attention import Source
from ..sampling.regions import resize_region
from .training_free_network import find_nearest, name_site


def make_source(
    bank: SiteBank,
    strength: float,
    region: Tensor | None,
    q: Tensor,
    size: tuple[int, int],
    adain: bool = False,
) -> Source:
    """Builds the source of queries q [B, H * W, D] from the bank of one layer and noise level.

    Args:
        strength: above 0; its logarithm is added to the logits of the bank's tokens.
        region: [h, w] of 0..1 over the image, or None for everywhere; its edges stay soft.
        size: (H, W) of the layer. adain: see `Source`.
    """
    bias = bank.bias
    if strength != 1:
        bias = bank.keys.new_zeros(bank.keys.shape[:2]) if bias is None else bias
        bias = bias + math.log(strength)
    if region is not None:
        region = resize_region(region, q.new_empty(1, 1, *size)).flatten()
    return Source(bank.keys, bank.values, bias, region, adain)


@dataclass(eq=False)
class JointRetrieval(Application):
    """An application of the training-free mode, in self-attention.

    Attributes:
        bank: with a site for each layer and noise level (`name_site`).
        strength: factor of the bank's tokens in the softmax; 0 switches retrieval off, 1 is plain
            attention over own tokens and bank.
        names: the U-Net's self-attention layers -> their names (`name_layers`).
        timesteps: the noise levels. steps: of the noise schedule.
        adain: see `Source`.

    Raises:
        RetrievalError: see `Application`, or a strength below 0.
    """

    names: Mapping[Attention, str] = field(default_factory=dict)
    timesteps: tuple[int, ...] = ()
    steps: int = 1000
    adain: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength < 0:
            raise RetrievalError(
                f"The training-free mode has strength {self.strength:g}, which must be 0 or more; "
                "0 switches retrieval off."
            )

    def source(
        self, layer: Attention, q: Tensor, size: tuple[int, int], progress: float, strength: float
    ) -> Source | None:
        """See `Application`."""
        name = self.names.get(layer, "")
        level = find_nearest(self.timesteps, (1 - progress) * (self.steps - 1))
        bank = self.bank.sites.get(name_site(name, level))
        strength *= self.site_strength.get(name, 1.0)
        if bank is None or strength <= 0:
            return None
        return make_source(bank, strength, self.region, q, size, self.adain)
