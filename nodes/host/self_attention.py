"""Replacement of the host's self-attention layers: matching and joint attention, isolation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ...retrieval_core.network.unet import MIDDLE, UNetConfig
from ...retrieval_core.sampling.applications import Application
from ...retrieval_core.sampling.isolation import Partition, attend_apart, partition
from ...retrieval_core.sampling.joint_attention import Source, attend_chunks
from ...retrieval_core.training_free import list_self_attention_layers
from . import step_context
from .attention import bind_attention
from .joint_application import JointApplication, attach_shift
from .step_context import StepContext, chunk_areas, crop_region

ATTN1 = "attn1"


class JointAttention:
    """An attn1 replacement of all chosen layers, for one or more applications.

    Clones of a model use one object. Caches the partitions of positions by regions, sizes, area and
    device, until the sampler ends.

    Attributes:
        applications: of the training-free mode.
        regions: applications whose regions are to be isolated in all layers.
        before: replacements by other packs. They are called for all rows as before; layers that
            have one isolate no regions.
    """

    def __init__(
        self,
        applications: tuple[JointApplication, ...],
        regions: tuple[Application, ...],
        before: Mapping[tuple, Callable],
    ):
        self.applications, self.regions, self.before = applications, regions, dict(before)
        self._partitions: dict[Any, Partition | None] = {}

    def __deepcopy__(self, memo: dict) -> JointAttention:
        return self

    def cleanup(self, *_: Any) -> None:
        """An ON_CLEANUP callback: frees the cache, also after an interruption."""
        self._partitions.clear()

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        kind, number = extra["block"][:2]
        index = extra.get("block_index", 0)
        before = self.before.get((kind, number, index), self.before.get((kind, number)))
        attend, heads = bind_attention(extra), extra["n_heads"]
        chunks = self._sources(name_layer(kind, number, index), q, k, extra)
        if before is None:
            partitions = self._find_partitions(q, extra)
            return attend_apart(attend, q, k, v, heads, chunks, partitions)
        own = before(q, k, v, extra)
        if not any(chunks):
            return own
        joint = attend_chunks(attend, q, k, v, heads, chunks)
        rows = zip(own.chunk(len(chunks)), joint.chunk(len(chunks)), chunks, strict=True)
        return torch.cat([theirs if not sources else ours for theirs, ours, sources in rows])

    def _sources(self, name: str, q: Tensor, k: Tensor, extra: dict) -> list[list[Source]]:
        """The sources of each chunk of the batch at a layer, whose keys applications match."""
        chunks: list[list[Source]] = [[] for _ in chunk_areas(extra, None)]
        for application in self.applications:
            if name == application.match_layer:
                application.match(k, extra)
            if name not in application.names:
                continue
            found = application.sources(name, q, extra)
            for chunk, source in zip(chunks, found, strict=True):
                if source is not None:
                    chunk.append(source)
        return chunks

    def _find_partitions(self, q: Tensor, extra: dict) -> list[Partition | None]:
        """The partition of each chunk of the batch; None where no regions are isolated."""
        context: StepContext | None = extra.get(step_context.STEP)
        areas = chunk_areas(extra, context)
        size = tuple(extra["activations_shape"][-2:])
        # Regions need positions, which patches that merge or tile tokens leave none of.
        if context is None or q.shape[1] != size[0] * size[1]:
            return [None] * len(areas)
        active = [region for region in self.regions if context.within(0.0, region.apart)]
        if len(active) < 2:
            return [None] * len(areas)
        found = []
        for area in areas:
            key = (tuple(map(id, active)), size, context.shape, area, q.device)
            if key not in self._partitions:
                masks = [crop_region(r.region, context, area).to(q.device) for r in active]
                self._partitions[key] = partition(masks, size)
            found.append(self._partitions[key])
        return found


def attach_joint_attention(
    model: Any,
    config: UNetConfig,
    retrieval: Application,
    joint: JointApplication | None = None,
) -> None:
    """Adds the region of a retrieval, if it is to be isolated, and its application in the
    training-free mode to the attn1 replacements of a MODEL.
    """
    applications = () if joint is None else (joint,)
    regions = () if retrieval.region is None or retrieval.apart == 0 else (retrieval,)
    if not applications and not regions:
        return
    options = model.model_options["transformer_options"]
    replaced = options.get("patches_replace", {}).get(ATTN1, {})
    before = {k: patch for k, patch in replaced.items() if not isinstance(patch, JointAttention)}
    ours = next((patch for patch in replaced.values() if isinstance(patch, JointAttention)), None)
    if ours is not None:
        applications, regions = ours.applications + applications, ours.regions + regions
        before = {**ours.before, **before}
    names = [name for one in applications for name in (one.match_layer, *one.names)]
    if regions:
        names += list_self_attention_layers(config)
    patch = JointAttention(applications, regions, before)
    for name in dict.fromkeys(names):
        model.set_model_attn1_replace(patch, *parse_layer_name(name))
    model.add_callback_with_key(CallbacksMP.ON_CLEANUP, step_context.KEY, patch.cleanup)
    attach_shift(model, applications)


def parse_layer_name(name: str) -> tuple[str, int, int]:
    """Parses `output_3.1` to the host's ("output", 3, 1)."""
    block, index = name.split(".")
    kind, _, number = block.partition("_")
    return kind, int(number or 0), int(index)


def name_layer(kind: str, number: int, index: int) -> str:
    """The inverse of `parse_layer_name`."""
    return f"{MIDDLE if kind == MIDDLE else f'{kind}_{number}'}.{index}"
