"""One application of references in the training-free mode, in the host's self-attention layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from ...retrieval_core.bank.site_bank import SiteBank
from ...retrieval_core.bank.tokens import EncodedReference
from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.sampling.applications import COND
from ...retrieval_core.sampling.joint_attention import Source
from ...retrieval_core.training_free import JointRetrieval, TrainingFree, list_self_attention_layers
from ...retrieval_core.training_free.joint_retrieval import make_source
from ...retrieval_core.training_free.joint_shares import choose_map_layer, measure_joint_shares
from ...retrieval_core.training_free.training_free_network import find_nearest, name_site
from . import step_context
from .recorder import Recorder
from .step_context import Area, StepContext, chunk_areas, chunk_kinds, crop_region, strength_at

LAST = 999  # the largest timestep


class JointApplication:
    """Training-free counterpart of `RetrievalPatch`; clones of a model use one object.

    Caches the layers' banks of one noise level by device and type, and the regions by latent size
    and area, until the sampler ends.
    """

    def __init__(
        self,
        network: TrainingFree,
        retrieval: JointRetrieval,
        references: Sequence[EncodedReference],
    ):
        self.network, self.retrieval = network, retrieval
        self.references = references  # all of them, also those of weight 0, without tokens
        self.names = network.names
        self._banks: dict[Any, tuple[int, dict[str, SiteBank]]] = {}
        self._regions: dict[Any, Tensor] = {}

    def __deepcopy__(self, memo: dict) -> JointApplication:
        return self

    @cached_property
    def map_layer(self) -> str:
        """The layer that a retrieval map is measured at."""
        return choose_map_layer(list_self_attention_layers(self.network.config), self.names)

    def sources(self, name: str, q: Tensor, extra: dict) -> list[Source | None]:
        """The source of each chunk of the batch at a layer; None for its own tokens only."""
        context: StepContext | None = extra.get(step_context.STEP)
        retrieval, size = self.retrieval, extra["activations_shape"][-2:]
        wanted = retrieval.retrieves(chunk_kinds(extra, context))
        strength = strength_at(retrieval, context) * retrieval.site_strength.get(name, 1.0)
        # A region needs positions, which patches that merge or tile tokens leave none of.
        fits = retrieval.region is None or q.shape[1] == size[0] * size[1]
        if strength <= 0 or not fits or not any(wanted):
            return [None] * len(wanted)
        bank = self._bank(q, context)[name]
        areas = chunk_areas(extra, None if retrieval.region is None else context)
        made = {
            area: make_source(bank, strength, self._region(context, area), q, size, retrieval.adain)
            for area in set(areas)
        }
        return [made[area] if asks else None for area, asks in zip(areas, wanted, strict=True)]

    def record(
        self,
        recorder: Recorder,
        found: Sequence[Source | None],
        q: Tensor,
        k: Tensor,
        extra: dict,
    ) -> None:
        """Adds the attention shares of the positive prompts' rows at `map_layer` to a recorder.

        Args:
            found: the layer's `sources`.
        """
        context: StepContext = extra[step_context.STEP]
        size, heads = extra["activations_shape"][-2:], extra["n_heads"]
        if q.shape[1] != size[0] * size[1]:  # a patch has merged the tokens
            return
        kinds, areas = chunk_kinds(extra, context), chunk_areas(extra, context)
        owner = self._bank(q, context)[self.map_layer].owner
        factor = list_self_attention_layers(self.network.config)[self.map_layer].downsampling
        chunks = zip(kinds, areas, found, q.chunk(len(kinds)), k.chunk(len(kinds)), strict=True)
        for kind, area, source, queries, keys in chunks:
            if kind != COND or source is None:
                continue
            shares = measure_joint_shares(queries, keys, heads, source, owner, len(self.references))
            shares = shares.transpose(1, 2).unflatten(2, tuple(size))
            recorder.add(self, shares, factor, context, area)

    def _bank(self, q: Tensor, context: StepContext | None) -> dict[str, SiteBank]:
        """The layers' banks at the step's noise level, on the device of q."""
        if context is None:  # called by something else than the host's samplers
            raise RetrievalError(
                "The training-free mode was called outside of ComfyUI's samplers, so the noise "
                "level is not known; sample with a KSampler or SamplerCustom node."
            )
        level = find_nearest(self.retrieval.timesteps, (1 - context.progress) * LAST)
        key = (q.device, q.dtype)
        loaded, banks = self._banks.get(key, (None, {}))
        if loaded != level:
            sites = self.retrieval.bank.sites
            banks = {
                name: sites[name_site(name, level)].to(q.device, q.dtype) for name in self.names
            }
            self._banks[key] = level, banks
        return banks

    def _region(self, context: StepContext | None, area: Area | None) -> Tensor | None:
        region = self.retrieval.region
        if region is None or context is None:
            return region
        key = (context.shape, area)
        found = self._regions.get(key)
        if found is None:  # a local value: another thread may clear the cache
            found = self._regions[key] = crop_region(region, context, area)
        return found

    def cleanup(self, *_: Any) -> None:
        """An ON_CLEANUP callback: frees the devices' copies, also after an interruption."""
        self._banks.clear()
        self._regions.clear()

    def nbytes(self, noise_shape: Any, dtype: torch.dtype) -> int:
        """Bytes that sampling needs: one level's bank, and keys and values of a layer joined with
        it for every row of both prompts."""
        layers = list_self_attention_layers(self.network.config)
        ends = [name_site("", level) for level in self.network.timesteps()]
        sizes = {
            site: bank.keys.numel() + bank.values.numel()
            for site, bank in self.retrieval.bank.sites.items()
        }
        level = max(sum(n for site, n in sizes.items() if site.endswith(end)) for end in ends)
        joined = []
        for name in self.names:
            layer = layers[name]
            positions = noise_shape[2] * noise_shape[3] // layer.downsampling**2
            tokens = max(sizes[name + end] for end in ends) + 2 * positions * layer.width
            joined.append(2 * noise_shape[0] * tokens)
        return int((level + max(joined)) * management.dtype_size(dtype))
