"""The application of a training-free bank to a U-Net of the core."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..bank.site_bank import SiteBank
from ..bank.tokens import MATCHED
from ..errors import RetrievalError
from ..network.unet import Attention
from ..sampling.applications import COND, Application
from ..sampling.joint_attention import Source
from ..sampling.presets import BALANCED, PRESETS, Preset
from ..sampling.regions import resize_region
from .latent_pull import find_shift, take
from .training_free_network import MEANS, REST, find_nearest, name_site


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
    """An application of the training-free mode: to a step's prediction, and in self-attention.

    Holds what the step takes at the matched layer until `shift` is called.

    Attributes:
        bank: with a site for each layer and noise level (`name_site`), and `MATCHED`.
        strength: factor of the bank's tokens in the softmax of the layers that attend to them, 1
            is plain attention over both; up to 1 also of the prediction's shift. 0 switches
            retrieval off.
        names: the U-Net's self-attention layers -> their names (`name_layers`).
        match_layer: name of the layer whose keys are matched. preset: of the latent pull.
        timesteps: the noise levels. steps: of the noise schedule.
        adain: see `Source`.

    Raises:
        RetrievalError: see `Application`, or a strength below 0.
    """

    names: Mapping[Attention, str] = field(default_factory=dict)
    match_layer: str = ""
    preset: Preset = PRESETS[BALANCED]
    timesteps: tuple[int, ...] = ()
    steps: int = 1000
    adain: bool = False
    _taken: Tensor | None = field(init=False, default=None, repr=False)

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
        bank = self.bank.sites.get(name_site(name, self._find_level(progress)))
        strength *= self.site_strength.get(name, 1.0)
        if bank is None or strength <= 0:
            return None
        return make_source(bank, strength, self.region, q, size, self.adain)

    def pull_at(self, progress: float) -> tuple[float, float]:
        """The parts that means and detail move at a progress of sampling, by groups of sites."""
        means, detail = self.preset.pull_at(progress)
        factors = self.site_strength
        return means * factors.get(MEANS, 1.0), detail * factors.get(REST, 1.0)

    def observe(
        self,
        layer: Attention,
        size: tuple[int, int],
        k: Tensor,
        cond_or_uncond: Sequence[int],
        progress: float,
    ) -> None:
        """See `Application`."""
        if self.names.get(layer) != self.match_layer or not any(self.pull_at(progress)):
            return
        rows = k.chunk(len(cond_or_uncond))[list(cond_or_uncond).index(COND)]
        bank = self.bank.sites[name_site(MATCHED, self._find_level(progress))]
        self._taken = take(rows, bank).transpose(1, 2).unflatten(2, size)

    def shift(
        self, x0: Tensor, text: Tensor | None, progress: float, strength: float
    ) -> Tensor | None:
        """See `Application`."""
        taken, self._taken = self._taken, None
        if taken is None:
            return None
        return min(strength, 1.0) * find_shift(x0, taken, text, *self.pull_at(progress))

    def _find_level(self, progress: float) -> int:
        return find_nearest(self.timesteps, (1 - progress) * (self.steps - 1))
