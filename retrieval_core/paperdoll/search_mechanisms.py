"""Mechanisms of the search: drawing with references read by the base's own U-Net.

Written for clarity of the comparison, with explicit attention; what is shipped is in
`retrieval_core.training_free`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..network.unet import Attention
from ..sampling.sampler import sample
from ..training_free import choose_layers, list_self_attention_layers, name_layers
from .cases import Case
from .generate import Sampling
from .model import PaperdollModel
from .search_rows import Setting, find_level

Recorded = dict[str, tuple[Tensor, Tensor, Tensor]]  # layer -> q, k, v


@dataclass(eq=False)
class References:
    """References of a batch of figures: latents, masks, and features read by the base's U-Net.

    Caches features by noise level, seed of the noise and text, for as long as it lives.

    Attributes:
        latents: [B, R, C, H, W]. shown: [B, R, h, w], 1 inside a reference's mask.
    """

    base: PaperdollModel
    latents: Tensor
    shown: Tensor
    cached: dict[tuple[int, int, str], tuple[Recorded, dict[str, Tensor]]] = field(
        default_factory=dict
    )
    with_skips: bool = False

    @classmethod
    def encode(cls, base: PaperdollModel, cases: Sequence[Case], count: int) -> References:
        """The first `count` references of each case."""
        device = base.vae.mean.device
        flat = [reference for case in cases for reference in case.references[:count]]
        unmasked = torch.ones(flat[0].image.shape[-2:])
        masks = torch.stack([unmasked if r.mask is None else r.mask for r in flat]).to(device)
        latents = base.vae.encode(torch.stack([r.image for r in flat]).to(device))
        latents, masks = (t.unflatten(0, (len(cases), count)) for t in (latents, masks))
        return cls(base, latents, (masks > 0).float())

    def read(self, level: int, seed: int, text: str) -> tuple[Recorded, dict[str, Tensor]]:
        """Queries, keys and values [B * R, N, D] by layer and skip features by site."""
        key = (level, seed, text)
        if key not in self.cached:
            self.cached[key] = self._record(*key)
        return self.cached[key]

    def read_all(self, keys: set[tuple[int, int, str]], skips: bool) -> None:
        """Reads all of `keys`, with skip features if asked, and frees what else is cached."""
        kept = keys if skips == self.with_skips else set()
        self.cached, self.with_skips = {k: v for k, v in self.cached.items() if k in kept}, skips
        for key in keys:
            self.read(*key)

    def _record(self, level: int, seed: int, text: str) -> tuple[Recorded, dict[str, Tensor]]:
        latents = self.latents.flatten(0, 1)
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed))
        steps = torch.full((len(latents),), level, device=latents.device)
        noised = self.base.schedule.noised(latents, noise.to(latents).expand_as(latents), steps)
        names, layers, skips = name_layers(self.base.unet), {}, {}

        def attend(layer: Attention, size: Any, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Any:
            layers[names[layer]] = q, k, v
            return layer.attend(q, k, v, heads)

        def keep(site: str, h: Tensor) -> Tensor:
            if self.with_skips:
                skips[site] = h
            return h

        context = self.base.text.encode([text] * len(latents))
        self.base.unet(noised, steps, context, skip_hook=keep, self_attention=attend)
        return layers, skips

    def coverage(self, size: Sequence[int]) -> Tensor:
        """Part of each token inside the masks, [B, R * N]."""
        return F.adaptive_avg_pool2d(self.shown, tuple(size)).flatten(1)

    def gather(self, tokens: Tensor) -> Tensor:
        """[B * R, N, D] to [B, R * N, D]."""
        return rearrange(tokens, "(b r) n d -> b (r n) d", r=self.latents.shape[1])


@dataclass(eq=False)
class Drawing:
    """One row's sampling of a batch of figures; holds the step's state between hooks.

    Attributes:
        progress: of the step, 0 to 1. timestep: of the step.
        matched: weights [B, N, M] of the bank's tokens and gate [B, N] of the layer that the pull
            matches at, of this step.
    """

    base: PaperdollModel
    references: References
    setting: Setting
    progress: float = 0.0
    timestep: int = 0
    matched: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        config, layers = self.base.unet.config, list_self_attention_layers(self.base.unet.config)
        self.names = name_layers(self.base.unet)
        self.layers = choose_layers(config, self.setting.layers)
        finest = min(layer.downsampling for layer in layers.values())
        outputs = [n for n, v in layers.items() if n[0] == "o" and v.downsampling == finest]
        coarse = next(n for n in layers if n[0] == "o")
        chosen = {
            "first": outputs[0],
            "coarse": coarse,
            "last": outputs[-1],
            "input": next(iter(layers)),
        }
        self.pull_layer = chosen.get(self.setting.pull_layer, self.setting.pull_layer)
        self.fine = {n for n, v in layers.items() if v.downsampling == finest}

    def sample(self, prompts: Sequence[str], noise: Tensor, how: Sampling) -> Tensor:
        """Pictures [B, 3, 64, 64]."""
        base = self.base
        self.cond, self.uncond = base.text.encode(prompts), base.text.encode([""] * len(prompts))
        self.step, self.cfg, self.steps = 0, how.cfg, how.steps
        with torch.inference_mode():
            return base.vae.decode(
                sample(self.denoise, noise, base.schedule, how.steps, how.sampler)
            )

    def denoise(self, x: Tensor, timestep: int) -> Tensor:
        """x0 with guidance of text and references, then pulled to the references' latents."""
        one, schedule = self.setting, self.base.schedule
        self.timestep, self.progress = timestep, 1 - timestep / (schedule.steps - 1)
        self.matched = None
        pushes = one.push != 0 and self.progress <= one.push_end
        pushes = pushes and self.step % one.push_every == 0
        negative = self.uncond
        if one.alternate and self.step % one.alternate == one.alternate - 1:
            negative = self.cond
        if one.negative_text:
            negative = torch.lerp(self.uncond, self.cond, one.negative_text)
        context = torch.cat([self.cond, negative] + [self.cond] * pushes)
        chunks = 2 + pushes
        sigma = schedule.sigmas()[timestep]
        rows = torch.cat([(x / (1 + sigma**2).sqrt()).to(x.dtype)] * chunks)
        steps = torch.full((len(rows),), timestep, device=x.device)
        hooks = {"skip_hook": self.inject, "self_attention": self.attend}
        if not one.acts:
            hooks = {}
        found = self.base.unet(rows, steps, context, **hooks).chunk(chunks)
        prediction = found[1] + self.cfg * (found[0] - found[1])
        if pushes:
            prediction = prediction + one.push * (found[0] - found[2])
        self.step += 1
        sigma = sigma.expand(len(x))
        positive, negative = (schedule.denoised(row, x, sigma) for row in found[:2])
        return self.pull(schedule.denoised(prediction, x, sigma), positive - negative)

    def read_ahead(self, steps: int) -> None:
        """Reads the references at all levels that sampling will need."""
        one, keys = self.setting, set()
        for timestep in self.base.schedule.timesteps(steps).tolist():
            wanted = [one.levels] * (one.strength > 0 or one.inject > 0)
            wanted += [one.value_levels] * (one.value_levels is not None)
            uses_match = one.pull > 0 or one.inject > 0 or one.detail > 0 or one.gated == "figure"
            wanted += [one.pull_levels] * uses_match
            for level in {find_level(levels, timestep) for levels in wanted}:
                keys |= {(level, seed, one.text) for seed in range(one.seeds)}
        self.references.read_all(keys, one.inject > 0)

    # Attention

    def attend(
        self, layer: Attention, size: Any, q: Tensor, k: Tensor, v: Tensor, heads: int
    ) -> Tensor:
        """Self-attention in which the rows that retrieve also see the bank."""
        one, name, count = self.setting, self.names[layer], len(self.cond)
        asking = count * (2 if one.guidance == "both" else 1)
        out = layer.attend(q, k, v, heads)
        if name == self.pull_layer and self.pulls:
            self.matched = self.match(name, size, q[:count], k[:count], v[:count], heads)
        start, end = one.window(name in self.fine)
        if name not in self.layers or not start <= self.progress <= end or one.strength <= 0:
            return out
        new = self.retrieve(name, size, q[:asking], k[:asking], v[:asking], heads, out[:asking])
        return torch.cat([new, out[asking:]])

    def read_bank(self, name: str, size: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values [B, M, D] and log weights [B, M] of the bank at this step."""
        one, refs = self.setting, self.references
        key_level = find_level(one.levels, self.timestep)
        value_level = key_level
        if one.value_levels is not None:
            value_level = find_level(one.value_levels, self.timestep)
        parts = []
        for seed in range(one.seeds):
            q, k, v = refs.read(key_level, seed, one.text)[0][name]
            if value_level != key_level:
                v = refs.read(value_level, seed, one.text)[0][name][2]
            parts.append([refs.gather(t) for t in (q, k, v)])
        q, k, v = (torch.cat(list(tensors), 1) for tensors in zip(*parts, strict=True))
        cover = refs.coverage(size)
        bias = torch.zeros_like(cover).masked_fill_(cover <= one.cover, float("-inf"))
        empty = torch.isinf(bias).all(1, keepdim=True)
        whole = torch.zeros_like(bias).masked_fill_(cover <= 0, float("-inf"))
        return q, k, v, torch.where(empty, whole, bias).repeat(1, one.seeds)

    def retrieve(
        self,
        name: str,
        size: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        plain: Tensor,
    ) -> Tensor:
        """Attention of the retrieving rows [B, N, D] to own tokens and bank, as the setting says.

        Args:
            plain: the layer's own attention.
        """
        one = self.setting
        bank_q, bank_k, bank_v, bias = self.read_bank(name, size)
        times = len(q) // len(bank_k)
        bank_q, bank_k, bank_v, bias = (
            t.repeat(times, *[1] * (t.ndim - 1)) for t in (bank_q, bank_k, bank_v, bias)
        )
        weights = bias.exp()[..., None]
        if one.adain_qk:
            q, k = match_statistics(q, bank_q, weights), match_statistics(k, bank_k, weights)
        if one.adain_v:
            v = match_statistics(v, bank_v, weights)
        if one.centred:
            bank_k = bank_k - position_mean(bank_k, self.references) + position_mean(k, None)
        split = [rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q, k, v, bank_k, bank_v)]
        q_, k_, v_, bank_k_, bank_v_ = split
        scale = q_.shape[-1] ** -0.5
        own = q_ @ k_.mT * scale
        if one.match == "attention":
            seen = q_ @ bank_k_.mT * (scale * one.sharpen)
        else:
            mine, theirs = describe(one.match, q, k, v), describe(one.match, bank_q, bank_k, bank_v)
            seen = (mine @ theirs.mT * (one.sharpen * 10))[:, None].expand(*own.shape[:3], -1)
        seen = seen + bias[:, None, None]
        if one.top_k:
            least = seen.topk(min(one.top_k, seen.shape[-1]), -1).values[..., -1:]
            seen = seen.masked_fill(seen < least, float("-inf"))
        seen = seen + torch.tensor(one.strength).log().item()
        if not one.own:
            joint = seen.softmax(-1) @ bank_v_
        elif one.blend is None:
            joint = torch.cat([own, seen], -1).softmax(-1) @ torch.cat([v_, bank_v_], 2)
        else:
            gate = one.blend
            if one.gated == "figure":
                gate = one.blend * self.find_gate(size).repeat(times, 1)[:, None, :, None]
            elif one.gated:
                mass = torch.cat([own, seen], -1).softmax(-1)[..., own.shape[-1] :].sum(-1)
                gate = one.blend * mass[..., None]
            within = own.softmax(-1) @ v_
            joint = within + gate * (seen.softmax(-1) @ bank_v_ - within)
        joint = rearrange(joint, "b h n d -> b n (h d)")
        return joint if one.boost == 1 else plain + one.boost * (joint - plain)

    # Correspondence

    def find_gate(self, size: Sequence[int]) -> Tensor:
        """The gate [B, N] at a layer's size; 0 before the step's match."""
        if self.matched is None:
            return self.cond.new_zeros(len(self.cond), size[0] * size[1])
        gate = self.matched[1]
        edge = int(gate.shape[1] ** 0.5)
        return F.adaptive_avg_pool2d(gate.unflatten(1, (edge, edge)), tuple(size)).flatten(1)

    @property
    def pulls(self) -> bool:
        """Whether this step needs the correspondence."""
        one = self.setting
        spans = (
            (one.pull, one.pull_start, one.pull_end),
            (one.detail, one.detail_start, one.detail_end),
            (one.inject, one.inject_start, one.inject_end),
            (one.gated == "figure", 0.0, 1.0),
        )
        return any(weight > 0 and s <= self.progress <= e for weight, s, e in spans)

    def match(
        self, name: str, size: Any, q: Tensor, k: Tensor, v: Tensor, heads: int
    ) -> tuple[Tensor, Tensor]:
        """Weights [B, N, M] of the bank's tokens at each place, and its gate [B, N]."""
        one, refs = self.setting, self.references
        level = find_level(one.pull_levels, self.timestep)
        bank_q, bank_k, bank_v = map(refs.gather, refs.read(level, 0, one.text)[0][name])
        cover = refs.coverage(size)[:, None]
        inside = cover > one.cover
        inside = torch.where(inside.any(-1, keepdim=True), inside, cover > 0)
        if one.pull_match == "attention":
            q_, k_, bank_k_ = (
                rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q, k, bank_k)
            )
            scale = q_.shape[-1] ** -0.5
            every = torch.cat([q_ @ bank_k_.mT, q_ @ k_.mT], -1) * scale
            every = every.flatten(0, 1)
            seen, own = every.split([bank_k.shape[1], k.shape[1]], -1)
            inside_ = inside.repeat_interleave(heads, 0)
            seen = seen.masked_fill(~inside_, float("-inf"))
            total = torch.cat([seen, own], -1).logsumexp(-1)
            gate = (seen.logsumexp(-1) - total).exp().unflatten(0, (-1, heads)).mean(1)
            logits = (seen * one.pull_sharpen).softmax(-1).unflatten(0, (-1, heads)).mean(1)
            weights = logits
        else:
            mine = describe(one.pull_match, q, k, v)
            theirs = describe(one.pull_match, bank_q, bank_k, bank_v)
            every = mine @ theirs.mT * (10 * one.pull_sharpen)
            gate = (every.softmax(-1) * inside).sum(-1)
            weights = every.masked_fill(~inside, float("-inf")).softmax(-1)
        if one.pull_top:
            least = weights.topk(min(one.pull_top, weights.shape[-1]), -1).values[..., -1:]
            weights = weights.where(weights >= least, 0)
            weights = weights / weights.sum(-1, keepdim=True)
        if one.pull_gate == "none":
            gate = torch.ones_like(gate)
        elif one.pull_gate == "sharp":
            gate = (4 * (gate - 0.25)).clamp(0, 1)
        return weights, gate

    def pull(self, x0: Tensor, text: Tensor) -> Tensor:
        """Moves x0 [B, C, H, W] towards the references' latents at matching places.

        Args:
            text: what the text changes, x0 of the prompt less x0 of the negative prompt.
        """
        one = self.setting
        means = one.pull * (one.pull_start <= self.progress <= one.pull_end)
        means *= 1 - one.pull_fade * self.progress / one.pull_end
        detail = one.detail * (one.detail_start <= self.progress <= one.detail_end)
        if self.matched is None or not (means or detail):
            return x0
        weights, gate = self.matched
        edge = int(gate.shape[1] ** 0.5)
        f = x0.shape[-1] // edge
        blocks = rearrange(x0, "b c (h f) (w g) -> b (h w) c (f g)", f=f, g=f)
        theirs = rearrange(
            self.references.latents, "b r c (h f) (w g) -> b (r h w) (c f g)", f=f, g=f
        )
        found = (weights @ theirs).unflatten(-1, (blocks.shape[2], f * f))
        shift = found - blocks
        if one.pull_mode == "alike":
            coarse = self.match_parts(blocks, theirs, weights, gate)
        else:
            coarse = shift.mean(-1, keepdim=True)
        moved = means * coarse + detail * (shift - shift.mean(-1, keepdim=True))
        if one.pull_yield:
            text = rearrange(text, "b c (h f) (w g) -> b (h w) c (f g)", f=f, g=f)
            along = (moved * text).sum((2, 3), keepdim=True)
            along = along / text.square().sum((2, 3), keepdim=True).clamp_min(1e-8)
            moved = moved - one.pull_yield * along.clamp_max(0) * text
        blocks = blocks + gate[..., None, None] * moved
        return rearrange(blocks, "b (h w) c (f g) -> b c (h f) (w g)", h=edge, f=f)

    def match_parts(self, blocks: Tensor, theirs: Tensor, weights: Tensor, gate: Tensor) -> Tensor:
        """Shift of each place by the difference of soft means over places that look alike."""
        alike = weights @ weights.mT * gate[:, None]
        alike = alike / alike.sum(-1, keepdim=True).clamp_min(1e-6)
        own = torch.einsum("bnm,bmcf->bncf", alike, blocks).mean(-1, keepdim=True)
        found = (weights @ theirs).unflatten(-1, blocks.shape[2:])
        found = torch.einsum("bnm,bmcf->bncf", alike, found).mean(-1, keepdim=True)
        return found - own

    def inject(self, site: str, h: Tensor) -> Tensor:
        """Moves skip features towards the references' at matching places (the last step's match
        where this step has none yet)."""
        one = self.setting
        if self.matched is not None:
            self.last = self.matched
        if one.inject <= 0 or not one.inject_start <= self.progress <= one.inject_end:
            return h
        if getattr(self, "last", None) is None or site not in one.inject_sites.split():
            return h
        weights, gate = self.last
        count, edge = len(self.cond), int(gate.shape[1] ** 0.5)
        f = h.shape[-1] // edge
        if f < 1:
            return h
        level = find_level(one.levels, self.timestep)
        theirs = self.references.read(level, 0, one.text)[1][site]
        theirs = rearrange(theirs, "(b r) c (h f) (w g) -> b (r h w) (c f g)", b=count, f=f, g=f)
        blocks = rearrange(h[:count], "b c (h f) (w g) -> b (h w) (c f g)", f=f, g=f)
        moved = blocks + one.inject * gate[..., None] * (weights @ theirs - blocks)
        moved = rearrange(moved, "b (h w) (c f g) -> b c (h f) (w g)", h=edge, f=f, g=f)
        return torch.cat([moved, h[count:]])


def describe(kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Unit descriptors [B, N, D'] of tokens: a choice of the letters q, k and v."""
    chosen = {"q": q, "k": k, "v": v}
    parts = [chosen[letter] - chosen[letter].mean(1, keepdim=True) for letter in kind]
    return torch.cat([F.normalize(part, dim=-1) for part in parts], -1) / len(parts) ** 0.5


def position_mean(tokens: Tensor, references: References | None) -> Tensor:
    """The mean over the batch of tokens [B, N, D] at each position."""
    if references is None:
        return tokens.mean((0, 1), keepdim=True)
    edge = tokens.unflatten(1, (references.latents.shape[1], -1)).mean((0, 1), keepdim=True)
    return edge.expand(1, references.latents.shape[1], -1, -1).flatten(1, 2)


def match_statistics(own: Tensor, bank: Tensor, weights: Tensor) -> Tensor:
    """Gives own [B, N, D] the bank's mean and deviation by channel; weights [B, M, 1]."""
    weights = weights / weights.sum(1, keepdim=True)
    mean_ = (weights * bank).sum(1, keepdim=True)
    deviation = (weights * (bank - mean_).square()).sum(1, keepdim=True).sqrt()
    normed = (own - own.mean(1, keepdim=True)) / (own.std(1, keepdim=True, correction=0) + 1e-5)
    return normed * deviation + mean_
