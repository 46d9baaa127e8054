"""Training-free counterpart of `RetrievalControlNet`: layers and noise levels of a base model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..bank.bank_file import KEYS_AND_VALUES, Maker
from ..bank.tokens import MATCHED
from ..errors import RetrievalError
from ..network.controlnet import Card
from ..network.fingerprint import fingerprint_weights
from ..network.unet import MIDDLE, UNet, UNetConfig
from ..sampling.controls import COMPOSITION, DETAIL, choose_group
from .attention_layers import Layer, choose_layers, list_self_attention_layers
from .latent_pull import choose_match_layer

LAYERS = "decoder"
LEVELS = 1
MOST_LEVELS = 50
MEANS, REST = "means", "rest"


def name_site(layer: str, timestep: int) -> str:
    """Name of a bank's site, a layer or `MATCHED` at a noise level: `output_4.0@500`."""
    return f"{layer}@{timestep}"


@dataclass(frozen=True)
class TrainingFree:
    """Layers and noise levels of a base U-Net that is its own retrieval network; no weights.

    Attributes:
        config: the base U-Net's shape. base: its name, one of `controlnet.BASES`.
        base_fingerprint: of its weights.
        layers: that attend to the references, see `choose_layers`.
        levels: number of noise levels a reference is encoded at.
        adain: match statistics while sampling (`JointRetrieval`); encoding does not depend on it.

    Raises:
        RetrievalError: an unknown choice of layers, or a number of levels outside 1..50.
    """

    config: UNetConfig
    base: str
    base_fingerprint: str
    layers: str = LAYERS
    levels: int = LEVELS
    adain: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= MOST_LEVELS:
            raise RetrievalError(
                f"Reading references at {self.levels} noise levels is not possible; give between "
                f"1 and {MOST_LEVELS}."
            )
        choose_layers(self.config, self.layers)

    @classmethod
    def from_unet(cls, unet: UNet, base: str, **choices: Any) -> TrainingFree:
        """The training-free mode on a U-Net of the core; `choices`: layers, levels, adain."""
        return cls(unet.config, base, fingerprint_weights(unet.state_dict()), **choices)

    @property
    def card(self) -> Card:
        """Recommended settings, as a trained network's file has them."""
        return Card(self.base, {"strength": 1.0, "guidance": "cond"})

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers that attend to the references."""
        return choose_layers(self.config, self.layers)

    @property
    def match_layer(self) -> str:
        """Name of the layer whose keys are matched (`latent_pull`)."""
        return choose_match_layer(self.config)

    @property
    def recorded(self) -> tuple[str, ...]:
        """Names of the layers that encoding records: the chosen ones and, for the match and for
        finding a reference's subject, those of the decoder."""
        layers = list_self_attention_layers(self.config)
        needed = {self.match_layer, *self.names, *(n for n in layers if n.startswith("output_"))}
        return tuple(name for name in layers if name in needed)

    def timesteps(self, steps: int = 1000) -> tuple[int, ...]:
        """The noise levels: mid-points of `levels` equal spans of the schedule, rising."""
        return tuple(int((i + 0.5) / self.levels * steps) for i in range(self.levels))

    def _sites(self) -> dict[str, Layer]:
        """Site of a bank (`name_site`) -> its layer."""
        layers = list_self_attention_layers(self.config)
        match = layers[self.match_layer]
        values = self.config.out_channels * match.downsampling**2 + 1
        held = {name: layers[name] for name in self.names}
        held[MATCHED] = Layer(max(match.width, values), match.downsampling)
        return {name_site(n, t): layer for t in self.timesteps() for n, layer in held.items()}

    def site_channels(self) -> dict[str, int]:
        """Site of a bank -> width."""
        return {site: layer.width for site, layer in self._sites().items()}

    def site_downsampling(self) -> dict[str, int]:
        """Site of a bank -> latent pixels per token along an edge."""
        return {site: layer.downsampling for site, layer in self._sites().items()}

    def groups(self) -> dict[str, str]:
        """Layer -> composition, middle or detail; see `controls.group_sites`.

        `MEANS` and `REST` are what the latent pull moves.
        """
        layers = list_self_attention_layers(self.config)
        factors = self.config.site_downsampling().values()
        return {MEANS: COMPOSITION, REST: DETAIL} | {
            name: choose_group(layers[name].downsampling, factors, name.startswith(MIDDLE))
            for name in self.names
        }

    @property
    def fingerprint(self) -> str:
        """Hash of the base's weights, the layers and the levels."""
        chosen = f"{self.base_fingerprint} {self.match_layer} {self.names} {self.timesteps()}"
        return hashlib.sha256(chosen.encode()).hexdigest()

    @property
    def maker(self) -> Maker:
        """What encoded references depend on."""
        return Maker(self.base, self.fingerprint, self.site_channels(), KEYS_AND_VALUES)


def find_nearest(timesteps: Sequence[int], timestep: float) -> int:
    """The noise level nearest to a timestep, the cleaner one of two."""
    timestep = round(timestep, 2)  # no digit beyond is reliable: hosts invert it in float32
    return min(timesteps, key=lambda level: (abs(level - timestep), level))
