"""One application of a training-free bank to a U-Net of the core."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..bank.site_bank import SiteBank
from ..errors import RetrievalError
from ..network.unet import Attention, SelfAttentionHook
from ..sampling.applications import COND, Retrieval
from ..sampling.joint_attention import Source, attend_chunks
from ..sampling.regions import region_at
from .training_free_network import nearest, site_name


def source_of(
    bank: SiteBank,
    strength: float,
    region: Tensor | None,
    q: Tensor,
    size: tuple[int, int],
    adain: bool = False,
) -> Source:
    """A bank at one layer and noise level as the queries q [B, H * W, D] attend to it.

    Args:
        strength: above 0; its logarithm is added to the logits of the bank's tokens.
        region: [H, W] of 0..1 over the image, or None for everywhere; its edges stay soft.
        size: (H, W) of the layer. adain: see `Source`.
    """
    bias = bank.bias
    if strength != 1:
        bias = bank.keys.new_zeros(bank.keys.shape[:2]) if bias is None else bias
        bias = bias + math.log(strength)
    if region is not None:
        region = region_at(region, q.new_empty(1, 1, *size)).flatten()
    return Source(bank.keys, bank.values, bias, region, adain)


@dataclass(frozen=True, eq=False)
class JointRetrieval(Retrieval):
    """`Retrieval` by joint self-attention; immutable.

    Attributes:
        sites: layer name -> the U-Net's own self-attention layer (`layer_modules`).
        bank: with a site for each layer and noise level (`network.site_name`).
        strength: the fidelity: the bank's tokens count this many times in the softmax; 0 switches
            retrieval off, 1 is plain attention over own tokens and bank.
        timesteps: the noise levels. steps: of the noise schedule.
        adain: the layers' own values take on the statistics of the bank's (`Source`).

    Raises:
        RetrievalError: what `Retrieval` refuses, and a strength below 0.
    """

    hooks: ClassVar[str] = "self_attention"

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

    def hook(  # type: ignore[override]
        self, cond_or_uncond: Sequence[int], progress: float
    ) -> SelfAttentionHook | None:
        """A U-Net's `self_attention` hook for one step, or None if nothing is to be done."""
        strength = self.strength_at(progress)
        if strength <= 0:
            return None
        level = nearest(self.timesteps, (1 - progress) * (self.steps - 1))
        names = {layer: name for name, layer in self.sites.items()}
        both = self.guidance == "both"
        wanted = [both or kind == COND for kind in cond_or_uncond]

        def hook(
            layer: Attention, size: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, heads: int
        ) -> Tensor:
            name = names.get(layer, "")
            bank = self.bank.sites.get(site_name(name, level))
            here = strength * self.site_strength.get(name, 1.0)
            if bank is None or here <= 0:
                return layer.attend(q, k, v, heads)
            source = source_of(bank, here, self.region, q, size, self.adain)
            chunks = [[source] if seen else [] for seen in wanted]
            return attend_chunks(layer.attend, q, k, v, heads, chunks)

        return hook
