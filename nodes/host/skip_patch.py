"""One application of references to a MODEL: the patch object that the host's U-Net calls."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import comfy.model_management as management
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ...retrieval_core.bank.bank_file import fingerprint_of
from ...retrieval_core.bank.site_bank import Bank
from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.network.unet import MIDDLE
from ...retrieval_core.sampling.applications import COND, Guidance, Retrieval
from ...retrieval_core.sampling.attention_map import map_site, shares_of
from ...retrieval_core.sampling.controls import Controls, site_groups
from ...retrieval_core.sampling.regions import soften
from . import environment as host
from . import step
from .encoded_references import References
from .host_regions import Area, Region
from .loaded_network import Network
from .recorder import RECORDERS, Recorder
from .self_attention import attach

UNCOND = 1
_DECODER = "retrieval_decoder"
# Feature-sized tensors alive at once at a site: normed, query, attended, projected, sum.
_ALIVE = 6


class RetrievalPatch:
    """An output_block_patch that adds what each site retrieves; immutable.

    The host copies a model's options deeply with every clone: this object returns itself instead.
    What it holds on the device exists only while a sampler runs.
    """

    def __init__(self, references: References, retrieval: Retrieval):
        network = references.network
        self.references, self.retrieval = references, retrieval
        self.region = Region.of(retrieval)
        self.sites = network.sites
        self.config = network.network.config
        self.last = len(self.config.site_channels()) - 2
        self.map_site = map_site(self.config)
        self._device: dict[Any, Any] = {}

    @property
    def reference_count(self) -> int:
        """Of all references, also those of weight 0."""
        return len(self.references.encoded)

    def __deepcopy__(self, memo: dict) -> RetrievalPatch:
        return self

    def to(self, device_or_dtype: Any) -> RetrievalPatch:
        """Called by the host on loading; the bank follows the features instead."""
        return self

    def models(self) -> list[Any]:
        """What the host is to load with the model: the sites' layers, not the encoder."""
        return [self.sites]

    def __call__(self, h: Tensor, hsp: Tensor, to: dict) -> tuple[Tensor, Tensor]:
        """Output block k joins the skip of input block n - 1 - k; at 0, h is the middle block's."""
        kind, index = to["block"]
        noted: step.Step | None = to.get(step.STEP)
        if kind != "output" or index > self.last:
            return h, hsp
        strength = step.strength_at(self.retrieval, noted)
        if strength == 0:
            return h, hsp
        if index == 0:
            h = self._add(MIDDLE, h, to, noted, strength)
        return h, self._add(f"input_{self.last - index}", hsp, to, noted, strength)

    def _add(
        self, site: str, h: Tensor, to: dict, noted: step.Step | None, strength: float
    ) -> Tensor:
        order = to.get("cond_or_uncond") or [COND]
        negative = {UNCOND} if noted is None else noted.unconditional
        rows = [UNCOND if i in negative else COND for i in order]
        areas: list[Area | None] = [None] * len(order)
        if noted is not None:
            areas = [noted.areas.get(uuid) for uuid in to.get("uuids") or areas]
        parts = list(zip(rows, areas, h.chunk(len(rows))))
        for recorder in to.get(RECORDERS, ()) if site == self.map_site else ():
            for row, area, part in parts:
                if row == COND and self.retrieval.site_strength.get(site, 1.0) != 0:
                    self._record(recorder, part, noted, area)
        if self.region is None or not any(areas):
            return self._within(h, noted, None).apply(site, h, rows, strength)
        return torch.cat(
            [self._within(h, noted, area).apply(site, p, [row], strength) for row, area, p in parts]
        )

    def _record(
        self, recorder: Recorder, h: Tensor, noted: step.Step | None, area: Area | None
    ) -> None:
        """Where the features h [B, C, H, W] look, in a crop of the picture or all of it."""
        key = (h.device, h.dtype, RECORDERS)
        if key not in self._device:
            bank = self.references.site_bank(self.map_site, h.device)
            self._device[key] = bank.to(h.device, h.dtype)
        retrieval, bank = self._within(h, noted, area), self._device[key]
        shares = shares_of(retrieval, self.map_site, h, bank, self.reference_count)
        if noted is None or area is None:
            recorder.add(self, shares)
            return
        factor = self.config.site_downsampling()[self.map_site]
        canvas = (-(-noted.shape[0] // factor), -(-noted.shape[1] // factor))
        recorder.add(self, shares, canvas, (area[2] // factor, area[3] // factor))

    def _on_device(self, h: Tensor) -> Retrieval:
        key = (h.device, h.dtype)
        if key not in self._device:
            bank = self.retrieval.bank.to(h.device, h.dtype)
            self._device[key] = replace(self.retrieval, bank=bank, outputs={})
        return self._device[key]

    def _within(self, h: Tensor, noted: step.Step | None, area: Area | None) -> Retrieval:
        """With the region at the latent's resolution, cut out at the conditioning's area."""
        if self.region is None or noted is None:
            return self._on_device(h)
        key = (h.device, h.dtype, noted.shape, area)
        if key not in self._device:
            region = self.region.over(noted, area).to(h.device)
            self._device[key] = replace(self._on_device(h), region=region)
        return self._device[key]

    def cleanup(self, *_: Any) -> None:
        """An ON_CLEANUP callback: frees the device's copies, also after an interruption."""
        self._device.clear()
        if self.region is not None:
            self.region.cleanup()

    def prepare_sampling(
        self, executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kw: Any
    ) -> Any:
        """A PREPARE_SAMPLING wrapper: the bank and the activations enter the memory estimate.

        The host's estimate is proportional to the latent's area, and nothing else of the shape
        is read, so a wider latent stands for the bytes that come on top.
        """
        if len(noise_shape) == 4:
            kind = getattr(model.model, "manual_cast_dtype", None) or model.model_dtype()
            estimate = max(1.0, float(model.memory_required(list(noise_shape))))
            wider = 1 + self.nbytes(noise_shape, kind) / estimate
            noise_shape = [*noise_shape[:3], noise_shape[3] * wider]
        return executor(model, noise_shape, conds, *args, **kw)

    def nbytes(self, noise_shape: Any, dtype: torch.dtype) -> int:
        """What sampling needs beside weights for noise_shape [B, C, H, W]: bank, activations."""
        bank = self.retrieval.bank
        sizes = [s.keys.numel() + s.values.numel() for s in bank.sites.values()]
        factors = self.config.site_downsampling()
        places = [
            width * math.ceil(noise_shape[2] / factors[site]) * noise_shape[3] / factors[site]
            for site, width in self.config.site_channels().items()
        ]
        outputs = sum(width * width for width in self.config.site_channels().values())
        values = sum(sizes) + outputs + _ALIVE * noise_shape[0] * max(places)
        return int(values * management.dtype_size(dtype))


def apply(
    model: Any,
    references: References,
    strength: float,
    start: float = 0.0,
    end: float = 1.0,
    guidance: Guidance | None = None,
    region: Tensor | None = None,
    controls: Controls | None = None,
) -> Any:
    """A clone of a MODEL that retrieves from the references; the input model is left as it was.

    Args:
        guidance: rows that retrieve; None for what the network's file recommends.
        region: [H, W] or [1, H, W] in 0..1 of any size, or None for everywhere.
        controls: None for a constant strength, equal at all sites, and the whole bank.

    Raises:
        RetrievalError: another base, a bad schedule, strength, weight, region or control.
    """
    network = references.network
    base = host.detect_base(model)
    host.check_fit(base, network.network.config, network.base, network.name)
    if not math.isfinite(strength):
        raise RetrievalError(f"The strength is {strength}; give a number, 0 for no retrieval.")
    guidance = guidance or network.network.card.recommended.get("guidance", "cond")
    controls = controls or Controls(token_budget=None)
    region = None if region is None else soften(_check_region(region), controls.region_blur)
    if not isinstance(network, Network):
        return network.apply(model, references, strength, start, end, guidance, region, controls)
    retrieval = Retrieval(
        network.network.retrieval,
        Bank(),
        strength,
        start,
        end,
        guidance,
        region,
        controls.curve,
        controls.site_strengths(site_groups(base.config)),
        apart=controls.apart,
    )
    patched = model.clone()
    if strength == 0 or not any(controls.groups) or not references.encoded:
        return patched
    bank = references.bank(controls.token_budget)
    patch = RetrievalPatch(references, replace(retrieval, bank=bank))
    patched.set_model_output_block_patch(patch)
    patched.add_callback_with_key(CallbacksMP.ON_CLEANUP, step.KEY, patch.cleanup)
    patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, step.KEY, patch.prepare_sampling)
    step.add_wrappers(patched)
    attach(patched, base.config, region=patch.region)
    _replace_decoder(patched, references)
    return patched


def _check_region(region: Tensor) -> Tensor:
    """[H, W] float32 in 0..1; RetrievalError for several masks, an empty one, or NaN."""
    region = region.detach().cpu().float()
    planes = region.reshape(-1, *region.shape[-2:]) if region.ndim > 1 else region[None, None]
    if len(planes) != 1 or not planes.numel():
        raise RetrievalError(
            f"The region has {len(planes)} masks of shape {list(region.shape)}; connect one mask."
        )
    if not planes.isfinite().all() or planes.max() <= 0:
        raise RetrievalError(
            f"The region selects none of its {planes.shape[2]} x {planes.shape[1]} pixels; paint "
            "where the references are to appear, or disconnect it."
        )
    return planes[0].clamp(0, 1)


def _replace_decoder(patched: Any, references: References) -> None:
    """Trained decoder weights as host weight patches, under whatever LoRAs came before."""
    network = references.network
    weights = network.network.decoder
    held = patched.get_attachment(_DECODER)
    if not weights:
        return
    fingerprint = fingerprint_of(weights)
    if held == fingerprint:
        return
    if held is not None:
        raise RetrievalError(
            f"The model already has the trained decoder of another network than '{network.name}'; "
            "apply references of one network with a decoder to a model."
        )
    patches = {f"diffusion_model.{key}": ("set", (value,)) for key, value in weights.items()}
    taken = patched.add_patches(patches)
    if len(taken) != len(patches):
        missing = sorted(set(patches) - set(taken))
        raise RetrievalError(
            f"The trained decoder of '{network.name}' has {len(missing)} weights that the model "
            f"lacks (first: {missing[0]}); load a model with the decoder of '{network.base}'."
        )
    for key in taken:
        entries = patched.patches[key]
        entries.insert(0, entries.pop())
    patched.set_attachments(_DECODER, fingerprint)
