"""Operation counts from shapes: the lower bound that each variant's time is compared with.

One multiplication with its addition counts as two operations, as in torch's flop counter. Norms,
activations and softmax are left out on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode

from retrieval_core.network.retrieval_site import choose_query_pools
from retrieval_core.network.unet import UNet, UNetConfig, UNetEncoder

TEXT_TOKENS = 77
# (in, out, stride) of the 3x3 convolutions of a ControlNet's hint block, at the picture's size.
_HINT = ((3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 96, 2), (96, 96, 1), (96, 256, 2))


def _inputs(config: UNetConfig, rows: int, height: int, width: int) -> tuple:
    x = torch.empty(rows, config.in_channels, height, width, device="meta")
    context = torch.empty(rows, TEXT_TOKENS, config.context_dim, device="meta")
    y = None
    if config.adm_in_channels is not None:
        y = torch.empty(rows, config.adm_in_channels, device="meta")
    return x, torch.zeros(rows, device="meta"), context, y


def base_operations(config: UNetConfig, rows: int, height: int, width: int) -> int:
    """Operations of one evaluation of the U-Net on `rows` latents of height x width."""
    x, steps, context, y = _inputs(config, rows, height, width)
    unet = UNet(config, device="meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        unet(x, steps, context, y)
    return counter.get_total_flops()


def encoder_operations(config: UNetConfig, rows: int, height: int, width: int) -> int:
    """Operations of the encoder and the middle block alone."""
    x, steps, context, y = _inputs(config, rows, height, width)
    encoder = UNetEncoder(config, device="meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        encoder.encode(x, encoder.embed(steps, y, x.dtype), context)
    return counter.get_total_flops()


def positions(
    config: UNetConfig, height: int, width: int, query_pooling: int = 1
) -> dict[str, int]:
    """site -> number of positions, or of pooled queries, of a latent of height x width."""
    factors, pools = config.site_downsampling(), choose_query_pools(config, query_pooling)
    edges = {site: factor * pools[site] for site, factor in factors.items()}
    return {site: -(-height // edge) * -(-width // edge) for site, edge in edges.items()}


def trained_operations(
    config: UNetConfig,
    rows: int,
    height: int,
    width: int,
    tokens: Mapping[str, int],
    query_pooling: int = 1,
) -> int:
    """The operations that retrieval adds to a step: query projection, attention, one output map.

    W_o and the zero convolution are one linear map, so they count once.

    Args:
        rows: the rows that retrieve. tokens: site -> tokens of its bank, the null token included.
        query_pooling: the network's.
    """
    sizes, total = positions(config, height, width, query_pooling), 0
    for site, channels in config.site_channels().items():
        projections = 2 * channels * channels
        attention = 2 * tokens[site] * channels
        total += 2 * rows * sizes[site] * (projections + attention)
    return total


def projection_operations(config: UNetConfig, tokens: Mapping[str, int]) -> int:
    """Projections of a bank's keys and values. tokens: site -> how many are projected there."""
    channels = config.site_channels()
    return sum(2 * 2 * tokens[site] * width**2 for site, width in channels.items())


def self_attention_operations(layers: Mapping[str, tuple[int, int, int]], rows: int) -> int:
    """Attention to tokens appended to self-attention layers; they need no projection.

    Args:
        layers: layer -> (positions, width, tokens appended).
    """
    return sum(2 * rows * count * 2 * added * width for count, width, added in layers.values())


def match_operations(rows: int, positions: int, keys: int, values: int, tokens: int) -> int:
    """The match of the training-free mode: attention of one head to tokens of other layers' width.

    Args:
        rows: those of the positive prompt. keys, values: widths.
    """
    return 2 * rows * positions * tokens * (keys + values)


def controlnet_operations(config: UNetConfig, rows: int, height: int, width: int) -> int:
    """A ControlNet's operations in a step: hint block, encoder and zero convolutions."""
    total = encoder_operations(config, rows, height, width)
    pixels = 64 * height * width
    for before, after, stride in (*_HINT, (256, config.model_channels, 1)):
        pixels //= stride**2
        total += 2 * rows * pixels * 9 * before * after
    sizes = positions(config, height, width)
    for site, channels in config.site_channels().items():
        total += 2 * rows * sizes[site] * channels**2
    return total
