"""The host's self-attention layers: what looks at a bank in them, and which regions keep apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.ldm.modules.attention as host_attention
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.network.unet import MIDDLE, UNetConfig
from ...retrieval_core.sampling.applications import COND
from ...retrieval_core.sampling.isolation import Partition, attend_apart, partition
from ...retrieval_core.training_free import Source, attend_chunks, self_attention_layers
from ...retrieval_core.training_free.training_free_network import nearest
from . import step
from .host_regions import Region
from .recorder import RECORDERS

ATTN1 = "attn1"
# The largest timestep; what a percentage of sampling is told apart by.
LAST = 999


class JointAttention:
    """An attn1 replacement of all chosen layers, for one or more applications; immutable.

    Attributes:
        applications: of the training-free mode, `joint_attention.Application`.
        regions: to be kept apart in all layers.
        before: what other packs had put in the layers' place; it goes on seeing all rows, and
            where it does the work nothing is kept apart.
    """

    def __init__(
        self,
        applications: tuple[Any, ...],
        regions: tuple[Region, ...],
        before: Mapping[tuple, Callable],
    ):
        self.applications, self.regions, self.before = applications, regions, dict(before)
        self._partitions: dict[Any, Partition | None] = {}

    def __deepcopy__(self, memo: dict) -> JointAttention:
        return self

    def cleanup(self, *_: Any) -> None:
        """An ON_CLEANUP callback: frees the device's copies, also after an interruption."""
        self._partitions.clear()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        kind, number = extra["block"][:2]
        index = extra.get("block_index", 0)
        before = self.before.get((kind, number, index), self.before.get((kind, number)))
        attend, heads = attention_of(extra), extra["n_heads"]
        chunks = self._chunks(_name(kind, number, index), q, k, extra)
        if before is None:
            parts = self._parts(q, extra, len(chunks))
            return _attend(attend, q, k, v, heads, chunks, parts)
        own = before(q, k, v, extra)
        if not any(chunks):
            return own
        joint = attend_chunks(attend, q, k, v, heads, chunks)
        parts = zip(own.chunk(len(chunks)), joint.chunk(len(chunks)), chunks, strict=True)
        return torch.cat([theirs if not sources else ours for theirs, ours, sources in parts])

    def _parts(self, q: Tensor, extra: dict, count: int) -> list[Partition | None]:
        """What the places of each chunk of the batch may attend to."""
        noted: step.Step | None = extra.get(step.STEP)
        size = tuple(extra["activations_shape"][-2:])
        # Patches that merge or tile the tokens leave no places for a region to be laid on.
        if noted is None or q.shape[1] != size[0] * size[1]:
            return [None] * count
        active = [region for region in self.regions if noted.within(0.0, region.apart)]
        if len(active) < 2:
            return [None] * count
        parts = []
        for uuid in extra.get("uuids") or [None] * count:
            area = noted.areas.get(uuid)
            key = (tuple(map(id, active)), size, noted.shape, area, q.device)
            if key not in self._partitions:
                masks = [region.over(noted, area).to(q.device) for region in active]
                self._partitions[key] = partition(masks, size)
            parts.append(self._partitions[key])
        return parts

    def _chunks(self, name: str, q: Tensor, k: Tensor, extra: dict) -> list[list[Source]]:
        noted: step.Step | None = extra.get(step.STEP)
        height, width = extra["activations_shape"][-2:]
        chunks: list[list[Source]] = [[] for _ in extra.get("cond_or_uncond") or [COND]]
        for application in self.applications:
            strength = step.strength_at(application.retrieval, noted)
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


def _attend(
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    chunks: Sequence[Sequence[Source]],
    parts: Sequence[Partition | None],
) -> Tensor:
    """Self-attention of chunks, each with its sources and its part of the places."""
    if not any(parts):
        return attend_chunks(attend, q, k, v, heads, chunks)
    if any(part is not parts[0] for part in parts):  # areas of the prompt cut the regions up
        pieces = zip(*(t.chunk(len(chunks)) for t in (q, k, v)), chunks, parts, strict=True)
        return torch.cat(
            [_attend(attend, *rows, heads, [own], [part]) for *rows, own, part in pieces]
        )
    assert parts[0] is not None

    def attend_part(q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
        # One object for one source: chunks that share theirs are attended to at once.
        here = {id(s): s.at(places) for sources in chunks for s in sources}
        cut = [[here[id(s)] for s in sources] for sources in chunks]
        return attend_chunks(attend, q, k, v, heads, cut)

    return attend_apart(attend_part, q, k, v, parts[0])


def attach(
    model: Any,
    config: UNetConfig,
    application: Any = None,
    region: Region | None = None,
) -> None:
    """Puts an application, and a region if it is to be kept apart, into the layers' place, beside
    those already there.
    """
    applications = () if application is None else (application,)
    regions = () if region is None or region.apart == 0 else (region,)
    if not applications and not regions:
        return
    options = model.model_options["transformer_options"]
    held = options.get("patches_replace", {}).get(ATTN1, {})
    before = {key: value for key, value in held.items() if not isinstance(value, JointAttention)}
    ours = next((value for value in held.values() if isinstance(value, JointAttention)), None)
    if ours is not None:
        applications, regions = ours.applications + applications, ours.regions + regions
        before = {**ours.before, **before}
    names = [name for one in applications for name in one.network.names]
    if regions:
        names += self_attention_layers(config)
    patch = JointAttention(applications, regions, before)
    for name in dict.fromkeys(names):
        model.set_model_attn1_replace(patch, *block_of(name))
    model.add_callback_with_key(CallbacksMP.ON_CLEANUP, step.KEY, patch.cleanup)


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
