"""Joint self-attention in the host's layers: the patch objects of the training-free mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.model_management as management
import comfy.utils
import torch
from torch import Tensor

from ..retrieval_core.bank import SiteBank
from ..retrieval_core.errors import RetrievalError
from ..retrieval_core.injection import COND
from ..retrieval_core.training_free import (
    JointRetrieval,
    Source,
    TrainingFree,
    attend_chunks,
    self_attention_layers,
)
from ..retrieval_core.training_free.injection import source_of
from ..retrieval_core.training_free.network import nearest, site_name
from ..retrieval_core.training_free.shares import joint_shares, map_layer
from ..retrieval_core.unet import MIDDLE
from . import step
from .patch import UNCOND, RetrievalPatch, strength_at
from .recorder import RECORDERS, Recorder

ATTN1 = "attn1"
# The largest timestep; what a percentage of sampling is told apart by.
LAST = 999


@dataclass(frozen=True, eq=False)
class Application:
    """One application of references; what it holds on the device lives while a sampler runs."""

    network: TrainingFree
    retrieval: JointRetrieval
    reference_count: int = 0
    _banks: dict[Any, dict[str, SiteBank]] = field(default_factory=dict)
    _regions: dict[Any, Tensor] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict) -> Application:
        return self

    def sources(
        self,
        name: str,
        q: Tensor,
        size: tuple[int, int],
        extra: dict,
        strength: float,
        level: int,
    ) -> list[Source | None]:
        """What each chunk of the batch attends to at a layer of `size` (height, width)."""
        noted: step.Step | None = extra.get(step.STEP)
        retrieval = self.retrieval
        order = extra.get("cond_or_uncond") or [COND]
        negative = {UNCOND} if noted is None else noted.unconditional
        wanted = [retrieval.guidance == "both" or i not in negative for i in order]
        strength *= retrieval.site_strength.get(name, 1.0)
        # Patches that merge or tile the tokens leave no places for a region to be laid on.
        placed = retrieval.region is None or q.shape[1] == size[0] * size[1]
        if strength <= 0 or not placed or not any(wanted):
            return [None] * len(order)
        bank = self._on_device(q, level)[name]
        areas: list[Any] = [None] * len(order)
        if retrieval.region is not None and noted is not None:
            uuids = extra.get("uuids") or areas
            areas = [noted.areas.get(uuid) for uuid in uuids]
        made = {
            area: source_of(bank, strength, self._region(noted, area), q, size, retrieval.adain)
            for area in set(areas)
        }
        return [made[area] if seen else None for area, seen in zip(areas, wanted, strict=True)]

    @cached_property
    def map_layer(self) -> str:
        """The layer that a retrieval map is read from."""
        return map_layer(self_attention_layers(self.network.config), self.network.names)

    def record(
        self,
        recorder: Recorder,
        found: Sequence[Source | None],
        q: Tensor,
        k: Tensor,
        size: tuple[int, int],
        extra: dict,
        level: int,
    ) -> None:
        """Where the positive prompts' rows look at `map_layer`, from what `sources` gave."""
        noted: step.Step = extra[step.STEP]
        if q.shape[1] != size[0] * size[1]:  # a patch has merged the tokens: no places are left
            return
        order, heads = extra.get("cond_or_uncond") or [COND], extra["n_heads"]
        areas = [noted.areas.get(uuid) for uuid in extra.get("uuids") or [None] * len(order)]
        owner = self._on_device(q, level)[self.map_layer].owner
        factor = self_attention_layers(self.network.config)[self.map_layer].downsampling
        canvas = (-(-noted.shape[0] // factor), -(-noted.shape[1] // factor))
        chunks = zip(order, areas, found, q.chunk(len(order)), k.chunk(len(order)), strict=True)
        for kind, area, source, queries, keys in chunks:
            if kind in noted.unconditional or source is None:
                continue
            shares = joint_shares(queries, keys, heads, source, owner, self.reference_count)
            shares = shares.transpose(1, 2).unflatten(2, size)
            if area is None:
                recorder.add(self, shares)
            else:
                recorder.add(self, shares, canvas, (area[2] // factor, area[3] // factor))

    def _on_device(self, q: Tensor, level: int) -> dict[str, SiteBank]:
        """The layers' banks at a noise level; of others only the CPU's copy stays."""
        key = (level, q.device, q.dtype)
        if key not in self._banks:
            self._banks.clear()
            sites = self.retrieval.bank.sites
            self._banks[key] = {
                name: sites[site_name(name, level)].to(q.device, q.dtype)
                for name in self.network.names
            }
        return self._banks[key]

    def _region(self, noted: step.Step | None, area: tuple[int, ...] | None) -> Tensor | None:
        """The region at the latent's resolution, cut out at the conditioning's area."""
        region = self.retrieval.region
        if region is None or noted is None:
            return region
        key = (noted.shape, area)
        if key not in self._regions:
            cut = comfy.utils.reshape_mask(region, (1, 1, *noted.shape))[0, 0]
            if area is not None:
                height, width, y, x = area
                cut = cut[y : y + height, x : x + width]
            self._regions[key] = cut
        return self._regions[key]

    def cleanup(self, *_: Any) -> None:
        """An ON_CLEANUP callback: frees the device's copies, also after an interruption."""
        self._banks.clear()
        self._regions.clear()

    def prepare_sampling(
        self, executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kw: Any
    ) -> Any:
        """A PREPARE_SAMPLING wrapper: the bank's memory enters the host's estimate."""
        return RetrievalPatch.prepare_sampling(
            self, executor, model, noise_shape, conds, *args, **kw
        )

    def nbytes(self, noise_shape: Any, dtype: torch.dtype) -> int:
        """What sampling needs beside weights: one level's bank, and keys and values of a layer
        joined with it for every row of both prompts."""
        layers = self_attention_layers(self.network.config)
        ends = [site_name("", level) for level in self.network.timesteps()]
        sizes = {
            site: bank.keys.numel() + bank.values.numel()
            for site, bank in self.retrieval.bank.sites.items()
        }
        level = max(sum(n for site, n in sizes.items() if site.endswith(end)) for end in ends)
        joined = []
        for name in self.network.names:
            layer = layers[name]
            places = noise_shape[2] * noise_shape[3] // layer.downsampling**2
            tokens = max(sizes[name + end] for end in ends) + 2 * places * layer.width
            joined.append(2 * noise_shape[0] * tokens)
        return int((level + max(joined)) * management.dtype_size(dtype))


class JointAttention:
    """An attn1 replacement of all chosen layers, for one or more applications; immutable.

    `before` holds what other packs had put in the layers' place: it goes on seeing all rows.
    """

    def __init__(self, applications: tuple[Application, ...], before: Mapping[tuple, Callable]):
        self.applications, self.before = applications, dict(before)

    def __deepcopy__(self, memo: dict) -> JointAttention:
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        kind, number = extra["block"][:2]
        index = extra.get("block_index", 0)
        before = self.before.get((kind, number, index), self.before.get((kind, number)))
        attend, heads = attention_of(extra), extra["n_heads"]
        chunks = self._chunks(_name(kind, number, index), q, k, extra)
        if before is None:
            return attend_chunks(attend, q, k, v, heads, chunks)
        own = before(q, k, v, extra)
        if not any(chunks):
            return own
        joint = attend_chunks(attend, q, k, v, heads, chunks)
        parts = zip(own.chunk(len(chunks)), joint.chunk(len(chunks)), chunks, strict=True)
        return torch.cat([theirs if not sources else ours for theirs, ours, sources in parts])

    def _chunks(self, name: str, q: Tensor, k: Tensor, extra: dict) -> list[list[Source]]:
        noted: step.Step | None = extra.get(step.STEP)
        height, width = extra["activations_shape"][-2:]
        chunks: list[list[Source]] = [[] for _ in extra.get("cond_or_uncond") or [COND]]
        for application in self.applications:
            strength = strength_at(application.retrieval, noted)
            if strength <= 0 or name not in application.network.names:
                continue
            levels = application.retrieval.timesteps
            if noted is None:  # called by something else than the host's samplers
                raise RetrievalError(
                    "The training-free mode was called outside of ComfyUI's samplers, so the "
                    "noise level is not known; sample with a KSampler or SamplerCustom node."
                )
            level = nearest(levels, (1 - noted.progress()) * LAST)
            found = application.sources(name, q, (height, width), extra, strength, level)
            for recorder in extra.get(RECORDERS, ()) if name == application.map_layer else ():
                application.record(recorder, found, q, k, (height, width), extra, level)
            for chunk, source in zip(chunks, found, strict=True):
                if source is not None:
                    chunk.append(source)
        return chunks


def attend_to(model: Any, application: Application) -> None:
    """Puts the application into the layers' place, beside those already there."""
    options = model.model_options["transformer_options"]
    held = options.get("patches_replace", {}).get(ATTN1, {})
    before = {key: value for key, value in held.items() if not isinstance(value, JointAttention)}
    ours = next((value for value in held.values() if isinstance(value, JointAttention)), None)
    earlier: tuple[Application, ...] = ()
    names = list(application.network.names)
    if ours is not None:
        earlier, before = ours.applications, {**ours.before, **before}
        names += [name for one in earlier for name in one.network.names]
    patch = JointAttention((*earlier, application), before)
    for name in dict.fromkeys(names):
        model.set_model_attn1_replace(patch, *block_of(name))


def attention_of(extra: dict) -> Callable[..., Tensor]:
    """The host's attention as the layer itself would call it, in the core's signature."""

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        how = {"attn_precision": extra.get("attn_precision"), "transformer_options": extra}
        if mask is None:
            return host_attention.optimized_attention(q, k, v, heads, **how)
        return host_attention.optimized_attention_masked(q, k, v, heads, mask=mask.to(q), **how)

    return attend


def block_of(name: str) -> tuple[str, int, int]:
    """`output_3.1` as the host names it: ("output", 3, 1)."""
    block, index = name.split(".")
    kind, _, number = block.partition("_")
    return kind, int(number or 0), int(index)


def _name(kind: str, number: int, index: int) -> str:
    return f"{MIDDLE if kind == MIDDLE else f'{kind}_{number}'}.{index}"
