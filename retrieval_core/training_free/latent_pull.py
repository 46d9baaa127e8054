"""The latent pull: a step's prediction x0 moves towards the references' clean latents.

Keys k of one self-attention layer of the base say which tokens m of the references correspond to a
token n of the picture, wherever they are (as features of a decoder do in DIFT, arXiv 2306.03881):

w_nm = softmax_m(SHARPNESS cos(k_n - mean k, k_m - mean k) + log weight_m)
u_n = sum_m w_nm c_m (z_m - x0_n)

z_m is the latent of a reference in the f x f pixels of token m; c_m is 1 inside the reference's
mask and 0 outside, so that what resembles the surroundings of a figure takes nothing. Means over a
token's pixels, E u, and what remains move by different parts, and where a shift runs against the
text, t = x0(prompt) - x0(negative prompt), that component is dropped:

s_n = means E u_n + detail (u_n - E u_n)
s_n <- s_n - min(<s_n, t_n>, 0) / <t_n, t_n> t_n
x0_n <- x0_n + min(strength, 1) region_n s_n

The network is not evaluated once more for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..bank.site_bank import SiteBank
from ..network.unet import UNetConfig
from ..sampling.joint_attention import repeat_banks
from .attention_layers import list_self_attention_layers

SHARPNESS = 60.0
_DOWNSAMPLING = 2
_LEAST = 1e-8


def choose_match_layer(config: UNetConfig) -> str:
    """The layer whose keys are matched: the decoder's first at half the latent's resolution.

    It is fine enough to tell an eye from hair and early enough to tell what they are. Without one,
    the U-Net's last.
    """
    layers = list_self_attention_layers(config)
    decoder = [name for name in layers if name.startswith("output_")]
    half = [name for name in decoder if layers[name].downsampling <= _DOWNSAMPLING]
    return (half or list(layers)[-1:])[0]


def make_match_tokens(keys: Tensor, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens [R, 2, N, D] of the site to match: keys, and values (z, c = 1), zero-padded.

    Args:
        keys: [R, N, D'] of a layer of `size` (height, width). latents: [R, C, H, W], clean.
    """
    patches = split_patches(latents, size).flatten(2).to(keys)
    values = torch.cat([patches, torch.ones_like(patches[..., :1])], -1)
    width = max(keys.shape[-1], values.shape[-1])
    return torch.stack([F.pad(t, (0, width - t.shape[-1])) for t in (keys, values)], 1)


def take(keys: Tensor, bank: SiteBank, values: Tensor | None = None) -> Tensor:
    """sum_m w_nm of values [G, M, V], by default (c z, c) of the bank: [B, N, V].

    Args:
        keys: of the picture, [B, N, D]; each of the G banks serves B / G consecutive rows.
    """
    wide = torch.promote_types(keys.dtype, torch.float32)
    values = bank.values if values is None else values
    bias = None if bank.bias is None else bank.bias.to(wide)
    weights = bank.keys.new_ones(bank.keys.shape[:2], dtype=wide) if bias is None else bias.exp()
    theirs = _describe(bank.keys[..., : keys.shape[-1]].to(wide), weights)
    own = _describe(keys.to(wide), keys.new_ones(keys.shape[:2], dtype=wide))
    if bias is not None:
        bias = repeat_banks(bias[:, None], len(keys))
    theirs, values = (repeat_banks(t.to(wide), len(keys)) for t in (theirs, values))
    return F.scaled_dot_product_attention(own, theirs, values, attn_mask=bias, scale=SHARPNESS)


def _describe(keys: Tensor, weights: Tensor) -> Tensor:
    """Directions of keys [B, N, D] from their mean, which is weighted by [B, N]."""
    mean = torch.einsum("bn,bnd->bd", weights, keys) / weights.sum(1, keepdim=True)
    return F.normalize(keys - mean[:, None], dim=-1)


def split_owners(bank: SiteBank, latents: int, references: int) -> Tensor:
    """Values c of each reference [G, M, references], of which `take` gives its share of the match.

    Args:
        latents: number of values z of a token, C * f * f.
    """
    inside = bank.values[..., latents, None]
    return inside * F.one_hot(bank.owner, references).to(inside)


def find_shift(
    x0: Tensor, taken: Tensor, text: Tensor | None, means: float, detail: float
) -> Tensor:
    """The shift s [B, C, H, W] of x0, see the module's formula; float32 or wider.

    Args:
        taken: (sum_m w_nm c_m z_m, sum_m w_nm c_m, ...), [B, V, h, w] at the layer's size.
        text: t [B, C, H, W], None where there is no negative prompt.
        means, detail: the parts that move, see `Preset.pull_at`.
    """
    size, (height, width) = tuple(taken.shape[2:]), x0.shape[2:]
    own = split_patches(x0.to(taken.dtype), size)
    found = taken.flatten(2).transpose(1, 2)
    count = own[0, 0].numel()
    shift = found[..., :count].unflatten(-1, own.shape[2:])
    shift = shift - found[..., count, None, None] * own
    mean = shift.mean(-1, keepdim=True)
    shift = means * mean + detail * (shift - mean)
    if text is not None:
        text = split_patches(text.to(taken.dtype), size)
        along = (shift * text).sum((2, 3), keepdim=True).clamp_max(0)
        along = along / text.square().sum((2, 3), keepdim=True).clamp_min(_LEAST)
        shift = shift - along * text
    factor = -(-height // size[0])
    shape = {"h": size[0], "f": factor}
    return rearrange(shift, "b (h w) c (f g) -> b c (h f) (w g)", **shape)[..., :height, :width]


def split_patches(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels of each token, [B, N, C, f * f], of latents [B, C, H, W] at a layer's size.

    Where f does not divide H or W, border pixels are repeated.
    """
    factor = -(-latents.shape[2] // size[0])
    missing = [factor * n - edge for n, edge in zip(size, latents.shape[2:], strict=True)]
    if any(missing):
        latents = F.pad(latents, (0, missing[1], 0, missing[0]), mode="replicate")
    return rearrange(latents, "b c (h f) (w g) -> b (h w) c (f g)", f=factor, g=factor)
