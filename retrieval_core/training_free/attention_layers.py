"""The self-attention layers of a U-Net by name, and named choices of them.

A name is the block and the index of the transformer block in it: `input_4.0`, `output_7.1`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import RetrievalError
from ..network.unet import MIDDLE, Attention, SpatialTransformer, UNet, UNetConfig


@dataclass(frozen=True)
class Layer:
    """A layer's width in channels, and latent pixels per token along an edge."""

    width: int
    downsampling: int


def list_self_attention_layers(config: UNetConfig) -> dict[str, Layer]:
    """Lists all self-attention layers of a U-Net in the order in which they run."""
    factors = list(config.site_downsampling().values())
    layers: dict[str, Layer] = {}

    def add(block: str, depth: int, width: int, factor: int) -> None:
        layers.update({f"{block}.{i}": Layer(width, factor) for i in range(depth)})

    for index, (_, _, width, depth) in enumerate(config.encoder_plan(), 1):
        add(f"input_{index}", depth, width, factors[index])
    add(MIDDLE, config.middle_depth, config.site_channels()[MIDDLE], factors[-1])
    index = 0
    for level in reversed(range(len(config.channel_mult))):
        for _ in range(config.num_res_blocks[level] + 1):
            width = config.model_channels * config.channel_mult[level]
            add(f"output_{index}", config.transformer_depth[level], width, 2**level)
            index += 1
    return layers


# Choice -> whether it has a layer, by (name, layer, least downsampling of the U-Net's layers).
_CHOICES: dict[str, Callable[[str, Layer, int], bool]] = {
    "all": lambda name, layer, finest: True,
    "encoder": lambda name, layer, finest: name.startswith("input_"),
    "decoder": lambda name, layer, finest: name.startswith("output_"),
    "middle and decoder": lambda name, layer, finest: name.startswith((MIDDLE, "output_")),
    "all but the finest": lambda name, layer, finest: layer.downsampling > finest,
    "finest": lambda name, layer, finest: layer.downsampling == finest,
}
NO_LAYERS = "none"
LAYER_CHOICES = (NO_LAYERS, *_CHOICES)


def choose_layers(config: UNetConfig, choice: str) -> tuple[str, ...]:
    """Names of the layers of a choice.

    Args:
        choice: one of `LAYER_CHOICES`, or blocks and layers, as in "middle, output_3, output_4.0".

    Raises:
        RetrievalError: an unknown name, or a choice that matches no layer of this U-Net.
    """
    if choice.strip() == NO_LAYERS:
        return ()
    layers = list_self_attention_layers(config)
    finest = min((layer.downsampling for layer in layers.values()), default=1)
    rule = _CHOICES.get(choice.strip())
    if rule is not None:
        chosen = [name for name, layer in layers.items() if rule(name, layer, finest)]
    else:
        wanted = [name.strip() for name in choice.split(",") if name.strip()]
        blocks = list(dict.fromkeys(name.split(".")[0] for name in layers))
        unknown = [name for name in wanted if name not in layers and name not in blocks]
        if unknown or not wanted:
            raise RetrievalError(
                f"There is no choice of layers {unknown[0] if unknown else choice!r}; choose "
                f"{', '.join(LAYER_CHOICES)}, or name blocks of this model with self-attention "
                f"({', '.join(blocks)})."
            )
        chosen = [n for n in layers if n in wanted or n.split(".")[0] in wanted]
    if not chosen:
        raise RetrievalError(
            f"The choice of layers '{choice}' matches none of this model's {len(layers)} "
            f"self-attention layers ({', '.join(layers) or 'it has none'}); choose another."
        )
    return tuple(chosen)


def name_layers(unet: UNet) -> dict[Attention, str]:
    """Module -> name, of all layers of `list_self_attention_layers`."""
    blocks = {f"input_{i}": block for i, block in enumerate(unet.input_blocks)}
    blocks[MIDDLE] = unet.middle_block
    blocks |= {f"output_{i}": block for i, block in enumerate(unet.output_blocks)}
    return {
        inner.attn1: f"{name}.{i}"
        for name, block in blocks.items()
        for layer in block
        if isinstance(layer, SpatialTransformer)
        for i, inner in enumerate(layer.transformer_blocks)
    }
