"""One application of a trained network to a MODEL: the patch that the host's U-Net calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from ...retrieval_core.bank.site_bank import SiteBank
from ...retrieval_core.bank.tokens import EncodedReference
from ...retrieval_core.network.unet import MIDDLE, UNetConfig
from ...retrieval_core.sampling.applications import COND, Retrieval
from ...retrieval_core.sampling.attention_map import choose_map_site, measure_shares
from . import step_context
from .recorder import RECORDERS, Recorder
from .self_attention import attach_joint_attention
from .step_context import Area, StepContext, chunk_areas, chunk_kinds, crop_region, strength_at

# Feature-sized tensors alive at once at a site: normed, query, attended, projected, sum.
_ALIVE = 6


class RetrievalPatch:
    """An output_block_patch that adds what each site retrieves.

    Clones of a model use one object (the host copies a model's options deeply, so that it copies to
    itself), also from threads on several devices. Caches bank, sites and cropped regions by device
    and type, until the sampler ends.

    Args:
        config: of the base's U-Net. retrieval: with its bank and sites on the CPU.
        references: all of them, also those of weight 0, without tokens.
        seen: unmerged bank of the site of the retrieval map (`measure_shares`), on the CPU.
    """

    def __init__(
        self,
        config: UNetConfig,
        retrieval: Retrieval,
        references: Sequence[EncodedReference],
        seen: SiteBank,
    ):
        self.config, self.retrieval = config, retrieval
        self.references, self.seen = references, seen
        self.last = len(config.site_channels()) - 2
        self.map_site = choose_map_site(config)
        self._device: dict[Any, Any] = {}

    def __deepcopy__(self, memo: dict) -> RetrievalPatch:
        return self

    def to(self, device_or_dtype: Any) -> RetrievalPatch:
        """Called by the host on loading; bank and sites follow the features instead."""
        return self

    @torch.compiler.disable
    def __call__(self, h: Tensor, hsp: Tensor, to: dict) -> tuple[Tensor, Tensor]:
        """Output block k joins the skip of input block n - 1 - k; at 0, h is the middle block's.

        Not compiled: compilation would make constants of values in `to`, such as the sigma.
        """
        kind, index = to["block"]
        context: StepContext | None = to.get(step_context.STEP)
        if kind != "output" or index > self.last:
            return h, hsp
        strength = strength_at(self.retrieval, context)
        if strength == 0:
            return h, hsp
        if index == 0:
            h = self._add(MIDDLE, h, to, context, strength)
        return h, self._add(f"input_{self.last - index}", hsp, to, context, strength)

    def _add(
        self, site: str, h: Tensor, to: dict, context: StepContext | None, strength: float
    ) -> Tensor:
        kinds, areas = chunk_kinds(to, context), chunk_areas(to, context)
        chunks = list(zip(kinds, areas, h.chunk(len(kinds)), strict=True))
        if site == self.map_site and self.retrieval.site_strength.get(site, 1.0) != 0:
            for recorder in to.get(RECORDERS, ()):
                for kind, area, chunk in chunks:
                    if kind == COND:
                        self._record(recorder, chunk, context, area)
        if self.retrieval.region is None or not any(areas):
            return self._within(h, context, None).add_retrieved(site, h, kinds, strength)
        return torch.cat(
            [
                self._within(h, context, area).add_retrieved(site, chunk, [kind], strength)
                for kind, area, chunk in chunks
            ]
        )

    def _record(
        self, recorder: Recorder, h: Tensor, context: StepContext | None, area: Area | None
    ) -> None:
        """Adds the attention shares of the features h [B, C, H, W] to a recorder."""
        key = (h.device, h.dtype, RECORDERS)
        bank = self._device.get(key)
        if bank is None:
            bank = self._device[key] = self.seen.to(h.device, h.dtype)
        retrieval = self._within(h, context, area)
        shares = measure_shares(retrieval, self.map_site, h, bank, len(self.references))
        factor = self.config.site_downsampling()[self.map_site]
        recorder.add(self, shares, factor, context, area)

    def _on_device(self, h: Tensor) -> Retrieval:
        key = (h.device, h.dtype)
        found = self._device.get(key)
        if found is None:
            bank = self.retrieval.bank.to(h.device, h.dtype)
            sites = {k: site.to(h.device, h.dtype) for k, site in self.retrieval.sites.items()}
            found = self._device[key] = replace(self.retrieval, bank=bank, sites=sites)
        return found

    def _within(self, h: Tensor, context: StepContext | None, area: Area | None) -> Retrieval:
        """The retrieval on h's device, with the region cropped to the conditioning's area."""
        region = self.retrieval.region
        if region is None or context is None:
            return self._on_device(h)
        key = (h.device, h.dtype, context.shape, area)
        found = self._device.get(key)
        if found is None:
            cropped = crop_region(region, context, area).to(h.device)
            found = self._device[key] = replace(self._on_device(h), region=cropped)
        return found

    def cleanup(self, *_: Any) -> None:
        """An ON_CLEANUP callback: frees the devices' copies, also after an interruption."""
        self._device.clear()

    def nbytes(self, noise_shape: Any, dtype: torch.dtype) -> int:
        """Bytes that sampling needs for noise_shape [B, C, H, W]: bank, sites, activations."""
        bank, sites = self.retrieval.bank, self.retrieval.sites
        tensors = [s.keys.numel() + s.values.numel() for s in bank.sites.values()]
        tensors += [s.norm.numel() + s.to_q.numel() + s.to_out.numel() for s in sites.values()]
        factors = self.config.site_downsampling()
        features = [
            width * math.ceil(noise_shape[2] / factors[site]) * noise_shape[3] / factors[site]
            for site, width in self.config.site_channels().items()
        ]
        values = sum(tensors) + _ALIVE * noise_shape[0] * max(features)
        return int(values * management.dtype_size(dtype))


def attach_patch(patched: Any, patch: RetrievalPatch) -> None:
    """Adds a patch and its wrappers of the sampler to a MODEL, in place."""
    patched.set_model_output_block_patch(patch)
    step_context.attach(patched, patch)
    attach_joint_attention(patched, patch.config, patch.retrieval)
