"""One application of references in the training-free mode, as the host's layers ask it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from ...retrieval_core.bank.site_bank import SiteBank
from ...retrieval_core.sampling.applications import COND
from ...retrieval_core.training_free import (
    JointRetrieval,
    Source,
    TrainingFree,
    self_attention_layers,
)
from ...retrieval_core.training_free.joint_retrieval import source_of
from ...retrieval_core.training_free.joint_shares import joint_shares, map_layer
from ...retrieval_core.training_free.training_free_network import site_name
from . import step
from .host_regions import Region
from .recorder import Recorder
from .skip_patch import UNCOND, RetrievalPatch


@dataclass(frozen=True, eq=False)
class Application:
    """One application of references; what it holds on the device lives while a sampler runs."""

    network: TrainingFree
    retrieval: JointRetrieval
    reference_count: int = 0
    _banks: dict[Any, dict[str, SiteBank]] = field(default_factory=dict)

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
    def region(self) -> Region | None:
        """Where it acts; None for everywhere."""
        return Region.of(self.retrieval)

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
        if self.region is None or noted is None:
            return self.retrieval.region
        return self.region.over(noted, area)

    def cleanup(self, *_: Any) -> None:
        """An ON_CLEANUP callback: frees the device's copies, also after an interruption."""
        self._banks.clear()
        if self.region is not None:
            self.region.cleanup()

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
