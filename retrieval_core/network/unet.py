"""The U-Net family of Stable Diffusion 1.x, 2.x and SDXL, in the original checkpoint layout.

The module tree mirrors `ldm.modules.diffusionmodules.openaimodel.UNetModel`, so a checkpoint's
`model.diffusion_model.*` weights load strictly. Every layer comes from an `operations` namespace
(torch.nn by default) and attention is one injected function, so a host can bring its own casting,
offloading and kernels.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count, takewhile
from operator import mul
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
        def check(good: bool, problem: str) -> None:
            if not good:
                raise RetrievalError(
                    f"The U-Net configuration has {problem}; use a file saved by this pack."
                )

        for name in ("channel_mult", "num_res_blocks", "transformer_depth"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
            found, levels = len(getattr(self, name)), len(self.channel_mult)
            check(found == levels, f"{levels} levels in channel_mult but {found} in {name}")
        check(
            (self.num_heads is None) != (self.num_head_channels is None),
            f"num_heads={self.num_heads} and num_head_channels={self.num_head_channels}, of which "
            "exactly one is to be set",
        )
        for name, value in vars(self).items():
            low = 0 if name in ("middle_depth", "num_res_blocks", "transformer_depth") else 1
            if name != "use_linear_in_transformer" and value is not None:
                numbers = value if isinstance(value, tuple) else (value,)
                good = all(type(number) is int and number >= low for number in numbers)
                check(good, f"{name}={value}, which is to be whole and {low} or more")
        for width in (self.model_channels, *(self.model_channels * m for m in self.channel_mult)):
            heads = self.heads(width)
            good = not (width % 32 or width % heads)  # group norms have 32 groups
            check(good, f"a width of {width} channels, which 32 or its {heads} heads do not divide")

    def heads(self, channels: int) -> int:
        """Number of attention heads at a width of `channels`."""
        if self.num_heads is not None:
            return self.num_heads
        assert self.num_head_channels is not None
        return max(1, channels // self.num_head_channels)

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
        return self._name_sites(
            [self.model_channels, *(out for _, _, out, _ in self.encoder_plan())]
        )

    def site_downsampling(self) -> dict[str, int]:
        """Downsampling factor of each site: latent pixels per token along an edge."""
        steps = (2 if kind == "down" else 1 for kind, *_ in self.encoder_plan())
        return self._name_sites(list(accumulate(steps, mul, initial=1)))

    def _name_sites(self, values: list[int]) -> dict[str, int]:
        """Values of the skip connections by site; the middle block has the last one's."""
        return {**{f"input_{i}": value for i, value in enumerate(values)}, MIDDLE: values[-1]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """The inverse of `asdict`; RetrievalError names what is missing, unknown or impossible."""
        try:
            return cls(**values)
        except TypeError as error:
            raise RetrievalError(
                f"The U-Net configuration does not make sense ({error}); use a file saved by this "
                "version of the pack."
            ) from error


SD15 = UNetConfig(320, (1, 2, 4, 4), (2, 2, 2, 2), (1, 1, 1, 0), 1, 768, num_heads=8)
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


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding [B, dim] of timesteps [B], cosines first (as in the checkpoints)."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000.0) * steps / half)[None]
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


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text and feed-forward on tokens [B, N, C]."""

    def __init__(self, dim: int, context_dim: int, heads: int, attend: Any, ops: Any, **kw: Any):
        super().__init__()
        self.attn1 = Attention(dim, dim, heads, attend, ops, **kw)
        last = ops.Linear(dim * 4, dim, **kw)
        net = nn.Sequential(GEGLU(dim, dim * 4, ops, **kw), nn.Dropout(0.0), last)
        self.ff = nn.Sequential(OrderedDict(net=net))
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
        sizes = channels, config.context_dim, config.heads(channels)

        def projection() -> nn.Module:
            if self.linear:
                return ops.Linear(channels, channels, **kw)
            return ops.Conv2d(channels, channels, 1, **kw)

        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(*sizes, attend, ops, **kw) for _ in range(depth)
        )
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


def _make_layers(
    config: UNetConfig,
    attend: Any,
    ops: Any,
    in_channels: int,
    channels: int,
    depth: int,
    **kw: Any,
) -> list[nn.Module]:
    """A residual block, and `depth` transformer blocks if any."""
    time = 4 * config.model_channels
    layers: list[nn.Module] = [ResBlock(in_channels, channels, time, ops, **kw)]
    if depth:
        layers.append(SpatialTransformer(channels, depth, config, attend, ops, **kw))
    return layers


class UNetEncoder(nn.Module):
    """Encoder half of the U-Net: time embedding, input blocks and middle block.

    Args:
        config: the U-Net's shape.
        operations: namespace with Linear, Conv2d, GroupNorm, LayerNorm.
        attend: attention function, see `attention`.
        kw: device, dtype of the weights.
    """

    def __init__(
        self,
        config: UNetConfig,
        operations: Any = nn,
        attend: AttentionFunction = attention,
        **kw: Any,
    ):
        super().__init__()
        ops, time = operations, 4 * config.model_channels
        make_layers = partial(_make_layers, config, attend, ops, **kw)
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
                op = ops.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, **kw)
                self.input_blocks.append(Block(nn.Sequential(OrderedDict(op=op))))
            else:
                self.input_blocks.append(Block(*make_layers(in_channels, out_channels, depth)))
        width = config.site_channels()[MIDDLE]
        middle = make_layers(width, width, config.middle_depth)
        self.middle_block = Block(*middle, ResBlock(width, width, time, ops, **kw))

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
        **kw: Any,
    ):
        super().__init__(config, operations, attend, **kw)
        ops = operations
        skips = list(config.site_channels().values())[:-1]
        channels = skips[-1]
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(config.channel_mult))):
            width = config.model_channels * config.channel_mult[level]
            for index in range(config.num_res_blocks[level] + 1):
                depth, wide = config.transformer_depth[level], channels + skips.pop()
                layers = _make_layers(config, attend, ops, wide, width, depth, **kw)
                channels = width
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


def detect_config(weights: Mapping[str, Tensor]) -> UNetConfig:
    """Derives the configuration from the shapes of a U-Net's weights, of SD 1.x, SD 2.x or SDXL.

    Raises:
        RetrievalError: the weights are not of this family.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    first = shapes.get("input_blocks.0.0.weight", ())
    if first[2:] != (3, 3) or "time_embed.0.weight" not in shapes:
        raise RetrievalError(
            "These weights have no 'input_blocks.0.0.weight' and time_embed of a U-Net; give a "
            "checkpoint of SD 1.x, SD 2.x or SDXL."
        )
    contexts = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    if not contexts:
        raise RetrievalError(
            "These weights have no cross-attention, so they are not a text-to-image U-Net of "
            "SD 1.x, SD 2.x or SDXL; give such a checkpoint."
        )

    def transformer_depth(stem: str) -> int:
        names = (f"{stem}.transformer_blocks.{n}.attn1.to_q.weight" for n in count())
        return sum(1 for _ in takewhile(shapes.__contains__, names))

    base = first[0]
    widths, blocks, depths = [base], [0], [0]
    for index in count(1):
        stem = f"input_blocks.{index}"
        residual = shapes.get(f"{stem}.0.in_layers.2.weight")
        if residual is not None:
            widths[-1], depths[-1] = residual[0], transformer_depth(f"{stem}.1")
            blocks[-1] += 1
        elif f"{stem}.0.op.weight" in shapes:
            widths, blocks, depths = [*widths, widths[-1]], [*blocks, 0], [*depths, 0]
        else:
            break
    projections = (shape for name, shape in shapes.items() if name.endswith("proj_in.weight"))
    adm, last = shapes.get("label_emb.0.0.weight"), shapes.get("out.2.weight", (4,))
    old_heads = contexts[0] == 768
    return UNetConfig(
        model_channels=base,
        channel_mult=tuple(width // base for width in widths),
        num_res_blocks=tuple(blocks),
        transformer_depth=tuple(depths),
        middle_depth=transformer_depth("middle_block.1"),
        context_dim=contexts[0],
        in_channels=first[1],
        out_channels=last[0],
        num_heads=8 if old_heads else None,
        num_head_channels=None if old_heads else 64,
        use_linear_in_transformer=any(len(shape) == 2 for shape in projections),
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
