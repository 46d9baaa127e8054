"""The U-Net family of Stable Diffusion 1.x, 2.x and SDXL, in the original checkpoint layout.

The module tree mirrors `ldm.modules.diffusionmodules.openaimodel.UNetModel`, so a checkpoint's
`model.diffusion_model.*` weights load strictly. Every layer comes from an `operations` namespace
(torch.nn by default) and attention is one injected function, so a host can bring its own casting,
offloading and kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RetrievalError

AttentionFunction = Callable[..., Tensor]
SkipHook = Callable[[str, Tensor], Tensor]
# (layer, (height, width), q, k, v, heads) -> attended; replaces attention in self-attention layers.
SelfAttentionHook = Callable[..., Tensor]

MIDDLE = "middle"
_SHORT = 1 << 17  # logits of one head, see `attention`


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention on [B, N, heads * d] tensors, softmax(q k^T / sqrt(d) + mask) v.

    `mask` is additive and broadcasts to [B, heads, N_q, N_k]. The signature is the host's
    `optimized_attention`, so that either can be injected.
    """
    batch, _, inner = q.shape
    q, k, v = (t.view(batch, -1, heads, inner // heads).transpose(1, 2) for t in (q, k, v))
    short = q.shape[2] * k.shape[2] <= _SHORT
    if short and q.device.type == "cpu" and torch.is_grad_enabled() and q.dtype == torch.bfloat16:
        # The fused kernel's backward pass takes 3 to 6 times as long there (Zen 5, torch 2.13).
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
        out = (logits if mask is None else logits + mask).softmax(-1).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).reshape(batch, -1, inner)


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of a U-Net: widths, depths and heads.

    Attributes:
        channel_mult, num_res_blocks, transformer_depth: one entry per level;
            `transformer_depth` is the number of transformer blocks after each residual block.
        num_heads, num_head_channels: exactly one of them is set.
        adm_in_channels: width of SDXL's vector conditioning, None without one.
    """

    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: tuple[int, ...]
    transformer_depth: tuple[int, ...]
    middle_depth: int
    context_dim: int
    in_channels: int = 4
    out_channels: int = 4
    num_heads: int | None = None
    num_head_channels: int | None = None
    use_linear_in_transformer: bool = False
    adm_in_channels: int | None = None

    def __post_init__(self) -> None:
        levels = len(self.channel_mult)
        for name in ("channel_mult", "num_res_blocks", "transformer_depth"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != levels:
                raise RetrievalError(
                    f"The U-Net configuration has {levels} levels in channel_mult but "
                    f"{len(getattr(self, name))} in {name}; give one entry a level."
                )
        if (self.num_heads is None) == (self.num_head_channels is None):
            raise RetrievalError(
                f"The U-Net configuration sets num_heads={self.num_heads} and num_head_channels="
                f"{self.num_head_channels}; set exactly one of them."
            )
        least = {"model_channels": 1, "context_dim": 1, "in_channels": 1, "out_channels": 1}
        least |= {"middle_depth": 0, "num_res_blocks": 0, "transformer_depth": 0}
        least |= {"channel_mult": 1, "num_heads": 1, "num_head_channels": 1, "adm_in_channels": 1}
        for name, low in least.items():
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            if not all(type(number) is int and number >= low for number in numbers):
                raise RetrievalError(
                    f"The U-Net configuration has {name}={value}; it must be whole and {low} or "
                    "more."
                )
        for width in (self.model_channels, *(self.model_channels * m for m in self.channel_mult)):
            if width % 32 or width % self.heads(width):  # group norms have 32 groups
                raise RetrievalError(
                    f"The U-Net configuration has a width of {width} channels and "
                    f"{self.heads(width)} heads; both 32 and the number of heads must divide it."
                )

    def heads(self, channels: int) -> int:
        """Number of attention heads at a width of `channels`."""
        if self.num_heads is not None:
            return self.num_heads
        assert self.num_head_channels is not None
        return max(1, channels // self.num_head_channels)

    @property
    def time_channels(self) -> int:
        """Width of the time embedding."""
        return self.model_channels * 4

    def encoder_plan(self) -> list[tuple[str, int, int, int]]:
        """(kind, in channels, out channels, transformer depth) of each input block after the first.

        kind is "res" or "down".
        """
        plan: list[tuple[str, int, int, int]] = []
        channels = self.model_channels
        for level, mult in enumerate(self.channel_mult):
            width = self.model_channels * mult
            for _ in range(self.num_res_blocks[level]):
                plan.append(("res", channels, width, self.transformer_depth[level]))
                channels = width
            if level != len(self.channel_mult) - 1:
                plan.append(("down", channels, channels, 0))
        return plan

    def site_channels(self) -> dict[str, int]:
        """Retrieval sites and their widths: every skip connection, then the middle block (§4.1)."""
        plan = self.encoder_plan()
        widths = [self.model_channels, *(out for _, _, out, _ in plan)]
        sites = {f"input_{i}": width for i, width in enumerate(widths)}
        sites[MIDDLE] = widths[-1]
        return sites

    def site_downsampling(self) -> dict[str, int]:
        """Downsampling factor of each site: latent pixels per token along an edge."""
        factor, factors = 1, [1]
        for kind, *_ in self.encoder_plan():
            factor *= 2 if kind == "down" else 1
            factors.append(factor)
        sites = {f"input_{i}": f for i, f in enumerate(factors)}
        sites[MIDDLE] = factors[-1]
        return sites

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of all fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """The inverse of `to_dict`; RetrievalError names what is missing, unknown or impossible."""
        known = set(cls.__dataclass_fields__)
        unknown = sorted(set(values) - known)
        if unknown:
            raise RetrievalError(
                f"The U-Net configuration has unknown fields {unknown}; this version knows "
                f"{sorted(known)}, so update the pack or use a file made for it."
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise RetrievalError(
                f"The U-Net configuration does not make sense ({error}); use a file saved by this "
                "pack."
            ) from error


SD15 = UNetConfig(320, (1, 2, 4, 4), (2, 2, 2, 2), (1, 1, 1, 0), 1, 768, num_heads=8)
SD21 = UNetConfig(
    320,
    (1, 2, 4, 4),
    (2, 2, 2, 2),
    (1, 1, 1, 0),
    1,
    1024,
    num_head_channels=64,
    use_linear_in_transformer=True,
)
SDXL = UNetConfig(
    320,
    (1, 2, 4),
    (2, 2, 2),
    (0, 2, 10),
    10,
    2048,
    num_head_channels=64,
    use_linear_in_transformer=True,
    adm_in_channels=2816,
)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding [B, dim] of timesteps [B], cosines first (as in the checkpoints)."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * steps / half)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _add_residual(fresh: Tensor, x: Tensor) -> Tensor:
    """In-place residual add into a layer's fresh output; saves one activation-sized allocation.

    Gradients need neither summand. Of two types (autocast) the sum has the wider one.
    """
    return fresh.add_(x) if fresh.dtype == x.dtype else fresh + x


class ResBlock(nn.Module):
    """Residual block with time embedding: x [B, C, H, W], emb [B, T] -> [B, C', H, W]."""

    def __init__(
        self, in_channels: int, out_channels: int, time_channels: int, ops: Any, **kw: Any
    ):
        super().__init__()
        self.in_layers = nn.Sequential(
            ops.GroupNorm(32, in_channels, **kw),
            nn.SiLU(),
            ops.Conv2d(in_channels, out_channels, 3, padding=1, **kw),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), ops.Linear(time_channels, out_channels, **kw))
        self.out_layers = nn.Sequential(
            ops.GroupNorm(32, out_channels, **kw),
            nn.SiLU(),
            nn.Dropout(0.0),
            ops.Conv2d(out_channels, out_channels, 3, padding=1, **kw),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.skip_connection = ops.Conv2d(in_channels, out_channels, 1, **kw)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = _add_residual(self.in_layers(x), self.emb_layers(emb)[:, :, None, None])
        return _add_residual(self.out_layers(h), self.skip_connection(x))


class Attention(nn.Module):
    """Multi-head attention of x [B, N, C] to a context [B, L, D], or to x itself without one."""

    def __init__(self, dim: int, context_dim: int, heads: int, attend: Any, ops: Any, **kw: Any):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.to_q = ops.Linear(dim, dim, bias=False, **kw)
        self.to_k = ops.Linear(context_dim, dim, bias=False, **kw)
        self.to_v = ops.Linear(context_dim, dim, bias=False, **kw)
        self.to_out = nn.Sequential(ops.Linear(dim, dim, **kw), nn.Dropout(0.0))

    def forward(
        self, x: Tensor, context: Tensor | None = None, attend: AttentionFunction | None = None
    ) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out((attend or self.attend)(q, k, v, self.heads))


class GEGLU(nn.Module):
    """Gated linear unit, [..., C] -> [..., inner]: half a projection times the GELU of the rest."""

    def __init__(self, dim: int, inner: int, ops: Any, **kw: Any):
        super().__init__()
        self.proj = ops.Linear(dim, inner * 2, **kw)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        gate = F.gelu(gate)
        # In place where no gradient needs the gate, the largest activation of the U-Net.
        return x * gate if torch.is_grad_enabled() else gate.mul_(x)


class FeedForward(nn.Module):
    """Feed-forward part of a transformer block, with a hidden width of 4 C."""

    def __init__(self, dim: int, ops: Any, **kw: Any):
        super().__init__()
        last = ops.Linear(dim * 4, dim, **kw)
        self.net = nn.Sequential(GEGLU(dim, dim * 4, ops, **kw), nn.Dropout(0.0), last)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text and feed-forward on tokens [B, N, C]."""

    def __init__(self, dim: int, context_dim: int, heads: int, attend: Any, ops: Any, **kw: Any):
        super().__init__()
        self.attn1 = Attention(dim, dim, heads, attend, ops, **kw)
        self.ff = FeedForward(dim, ops, **kw)
        self.attn2 = Attention(dim, context_dim, heads, attend, ops, **kw)
        self.norm1 = ops.LayerNorm(dim, **kw)
        self.norm2 = ops.LayerNorm(dim, **kw)
        self.norm3 = ops.LayerNorm(dim, **kw)

    def forward(
        self, x: Tensor, context: Tensor, attend: AttentionFunction | None = None
    ) -> Tensor:
        x = _add_residual(self.attn1(self.norm1(x), attend=attend), x)
        x = _add_residual(self.attn2(self.norm2(x), context), x)
        return _add_residual(self.ff(self.norm3(x)), x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of x [B, C, H, W], between two projections."""

    def __init__(
        self, channels: int, depth: int, config: UNetConfig, attend: Any, ops: Any, **kw: Any
    ):
        super().__init__()
        self.linear = config.use_linear_in_transformer
        self.norm = ops.GroupNorm(32, channels, eps=1e-6, **kw)
        blocks = (
            TransformerBlock(
                channels, config.context_dim, config.heads(channels), attend, ops, **kw
            )
            for _ in range(depth)
        )

        def projection() -> nn.Module:
            if self.linear:
                return ops.Linear(channels, channels, **kw)
            return ops.Conv2d(channels, channels, 1, **kw)

        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = projection()

    def forward(
        self, x: Tensor, context: Tensor, self_attention: SelfAttentionHook | None = None
    ) -> Tensor:
        height, width = x.shape[-2:]
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        # Contiguous: every norm would copy a transposed view, and sums with it are slow.
        h = h.flatten(2).transpose(1, 2).contiguous()
        if self.linear:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            attend = self_attention and partial(self_attention, block.attn1, (height, width))
            h = block(h, context, attend)
        if self.linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).contiguous().unflatten(2, (height, width))
        if not self.linear:
            h = self.proj_out(h)
        return _add_residual(h, x)


class Downsample(nn.Module):
    """Strided convolution: [B, C, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]."""

    def __init__(self, channels: int, ops: Any, **kw: Any):
        super().__init__()
        self.op = ops.Conv2d(channels, channels, 3, stride=2, padding=1, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour interpolation of [B, C, H, W] to `size`, and a convolution."""

    def __init__(self, channels: int, ops: Any, **kw: Any):
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, 3, padding=1, **kw)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Sequential):
    """Calls each layer with the arguments that it takes (openaimodel's TimestepEmbedSequential)."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor,
        size: tuple[int, int] | None = None,
        self_attention: SelfAttentionHook | None = None,
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, self_attention)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class UNetEncoder(nn.Module):
    """Encoder half of the U-Net: time embedding, input blocks and middle block.

    Args:
        config: the U-Net's shape.
        operations: namespace with Linear, Conv2d, GroupNorm, LayerNorm.
        attend: attention function, see `attention`.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        config: UNetConfig,
        operations: Any = nn,
        attend: AttentionFunction = attention,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        kw = {"device": device, "dtype": dtype}
        ops, time = operations, config.time_channels
        self.config = config

        def embedding(width: int) -> nn.Sequential:
            first = ops.Linear(width, time, **kw)
            return nn.Sequential(first, nn.SiLU(), ops.Linear(time, time, **kw))

        self.time_embed = embedding(config.model_channels)
        if config.adm_in_channels is not None:
            self.label_emb = nn.Sequential(embedding(config.adm_in_channels))
        first = ops.Conv2d(config.in_channels, config.model_channels, 3, padding=1, **kw)
        self.input_blocks = nn.ModuleList([Block(first)])
        for kind, in_channels, out_channels, depth in config.encoder_plan():
            if kind == "down":
                self.input_blocks.append(Block(Downsample(in_channels, ops, **kw)))
                continue
            layers: list[nn.Module] = [ResBlock(in_channels, out_channels, time, ops, **kw)]
            if depth:
                layers.append(SpatialTransformer(out_channels, depth, config, attend, ops, **kw))
            self.input_blocks.append(Block(*layers))
        width = config.site_channels()[MIDDLE]
        middle: list[nn.Module] = [ResBlock(width, width, time, ops, **kw)]
        if config.middle_depth:
            middle.append(SpatialTransformer(width, config.middle_depth, config, attend, ops, **kw))
        middle.append(ResBlock(width, width, time, ops, **kw))
        self.middle_block = Block(*middle)

    def embed(self, timesteps: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Time (and SDXL vector) embedding [B, 4 * model_channels]."""
        emb = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(dtype))
        if self.config.adm_in_channels is not None:
            if y is None:
                raise RetrievalError(
                    "This base model takes a vector conditioning of "
                    f"{self.config.adm_in_channels} values and got none; pass y."
                )
            emb = emb + self.label_emb(y.to(dtype))
        return emb

    def encode(
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor,
        self_attention: SelfAttentionHook | None = None,
    ) -> list[Tensor]:
        """Output of every input block (the skip features), then that of the middle block."""
        features = []
        for block in self.input_blocks:
            x = block(x, emb, context, self_attention=self_attention)
            features.append(x)
        features.append(self.middle_block(x, emb, context, self_attention=self_attention))
        return features


class UNet(UNetEncoder):
    """The whole U-Net: forward(x [B, C, H, W], timesteps [B], context [B, L, D]) -> [B, C', H, W].

    `skip_hook(site, h)` replaces each skip feature before the decoder concatenates it, and the
    middle block's output; sites are named as in `UNetConfig.site_channels`.
    `self_attention(layer, (height, width), q, k, v, heads)` replaces the attention function of
    every self-attention layer (`attn1`); q, k, v and its result are [B, H * W, heads * d].
    """

    def __init__(
        self,
        config: UNetConfig,
        operations: Any = nn,
        attend: AttentionFunction = attention,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(config, operations, attend, device, dtype)
        kw = {"device": device, "dtype": dtype}
        ops, time = operations, config.time_channels
        skips = list(config.site_channels().values())[:-1]
        channels = skips[-1]
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(config.channel_mult))):
            width = config.model_channels * config.channel_mult[level]
            for index in range(config.num_res_blocks[level] + 1):
                layers: list[nn.Module] = [ResBlock(channels + skips.pop(), width, time, ops, **kw)]
                channels = width
                depth = config.transformer_depth[level]
                if depth:
                    layers.append(SpatialTransformer(width, depth, config, attend, ops, **kw))
                if level and index == config.num_res_blocks[level]:
                    layers.append(Upsample(width, ops, **kw))
                self.output_blocks.append(Block(*layers))
        self.out = nn.Sequential(
            ops.GroupNorm(32, channels, **kw),
            nn.SiLU(),
            ops.Conv2d(channels, config.out_channels, 3, padding=1, **kw),
        )

    def decode(
        self,
        features: list[Tensor],
        emb: Tensor,
        context: Tensor,
        skip_hook: SkipHook | None,
        self_attention: SelfAttentionHook | None = None,
    ) -> Tensor:
        """The decoder half, from `encode`'s features to the prediction."""
        *skips, x = features
        if skip_hook is not None:
            x = skip_hook(MIDDLE, x)
        for block in self.output_blocks:
            skip = skips.pop()
            if skip_hook is not None:
                skip = skip_hook(f"input_{len(skips)}", skip)
            # An odd edge is rounded up going down; upsampling restores the next skip's size.
            size = tuple(skips[-1].shape[-2:]) if skips else None
            x = block(torch.cat([x, skip], dim=1), emb, context, size, self_attention)
        return self.out(x)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        skip_hook: SkipHook | None = None,
        self_attention: SelfAttentionHook | None = None,
    ) -> Tensor:
        """Prediction [B, C', H, W], see the class; y: [B, A], for a vector conditioning only."""
        emb = self.embed(timesteps, y, x.dtype)
        features = self.encode(x, emb, context, self_attention)
        return self.decode(features, emb, context, skip_hook, self_attention)


def detect_config(weights: Mapping[str, Tensor], prefix: str = "") -> UNetConfig:
    """Derives the configuration from the shapes of a checkpoint of SD 1.x, SD 2.x or SDXL.

    Args:
        weights: tensors under `prefix` in the original layout.
        prefix: "model.diffusion_model." for a whole checkpoint.

    Raises:
        RetrievalError: the weights are not of this family.
    """

    def shape(key: str) -> tuple[int, ...] | None:
        tensor = weights.get(prefix + key)
        return None if tensor is None else tuple(tensor.shape)

    first, last = shape("input_blocks.0.0.weight"), shape("out.2.weight")
    if first is None or first[2:] != (3, 3) or shape("time_embed.0.weight") is None:
        raise RetrievalError(
            f"These weights have no '{prefix}input_blocks.0.0.weight' and time_embed of a U-Net; "
            "give a checkpoint of SD 1.x, SD 2.x or SDXL."
        )
    base = first[0]
    mults, blocks, depths = [], [], []
    level_blocks, width, depth, index = 0, base, 0, 1

    def transformer_depth(stem: str) -> int:
        n = 0
        while shape(f"{stem}.transformer_blocks.{n}.attn1.to_q.weight") is not None:
            n += 1
        return n

    while True:
        stem = f"input_blocks.{index}.0"
        res = shape(f"{stem}.in_layers.2.weight")
        if res is not None:
            level_blocks, width = level_blocks + 1, res[0]
            depth = transformer_depth(f"input_blocks.{index}.1")
        else:
            mults.append(width // base)
            blocks.append(level_blocks)
            depths.append(depth)
            level_blocks, depth = 0, 0
            if shape(f"{stem}.op.weight") is None:
                break
        index += 1
    keys = (k for k in weights if k.startswith(prefix) and k.endswith("attn2.to_k.weight"))
    context_dim = next((weights[k].shape[1] for k in keys), None)
    if context_dim is None:
        raise RetrievalError(
            "These weights have no cross-attention, so they are not a text-to-image U-Net of "
            "SD 1.x, SD 2.x or SDXL; give such a checkpoint."
        )
    linear = any(
        k.startswith(prefix + "input") and k.endswith("proj_in.weight") and w.ndim == 2
        for k, w in weights.items()
    )
    adm = shape("label_emb.0.0.weight")
    old_heads = context_dim == 768
    return UNetConfig(
        model_channels=base,
        channel_mult=tuple(mults),
        num_res_blocks=tuple(blocks),
        transformer_depth=tuple(depths),
        middle_depth=transformer_depth("middle_block.1"),
        context_dim=context_dim,
        in_channels=first[1],
        out_channels=last[0] if last else 4,
        num_heads=8 if old_heads else None,
        num_head_channels=None if old_heads else 64,
        use_linear_in_transformer=linear,
        adm_in_channels=adm[1] if adm else None,
    )


def check_weights(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], what: str) -> None:
    """Raises RetrievalError, in one sentence, unless keys and shapes are exactly as expected."""
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected)
    common = sorted(expected.keys() & weights.keys())
    wrong = [k for k in common if expected[k].shape != weights[k].shape]
    if missing or extra or wrong:
        problems = [
            f"{len(keys)} {kind} (first: {keys[0]})"
            for kind, keys in (("missing", missing), ("unexpected", extra), ("misshapen", wrong))
            if keys
        ]
        raise RetrievalError(
            f"The {what} weights do not fit: {', '.join(problems)} keys; use a file made for this "
            "model by this version of the pack."
        )


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """`load_state_dict` after `check_weights`, so that a refused file changes nothing."""
    check_weights(module.state_dict(), weights, what)
    module.load_state_dict(dict(weights))
