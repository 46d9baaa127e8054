"""One application of references in the training-free mode, in self-attention and after CFG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from ...retrieval_core.bank.site_bank import SiteBank
from ...retrieval_core.bank.tokens import MATCHED, EncodedReference
from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.sampling.applications import COND
from ...retrieval_core.sampling.attention_map import Shares
from ...retrieval_core.sampling.joint_attention import Source
from ...retrieval_core.sampling.regions import add_shifts, resize_region
from ...retrieval_core.training_free import JointRetrieval, TrainingFree, list_self_attention_layers
from ...retrieval_core.training_free.joint_retrieval import make_source
from ...retrieval_core.training_free.latent_pull import find_shift, split_owners, take
from ...retrieval_core.training_free.training_free_network import find_nearest, name_site
from . import step_context
from .recorder import RECORDERS
from .step_context import (
    Area,
    StepContext,
    Taken,
    chunk_areas,
    chunk_kinds,
    crop_region,
    locate_crop,
    strength_at,
)

LAST = 999  # the largest timestep
POST_CFG = "sampler_post_cfg_function"
_ALIVE = 4  # float32 copies of tokens and positions alive at once while they are matched


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
        self.names, self.match_layer = network.names, network.match_layer
        layers = list_self_attention_layers(network.config)
        self.factor = layers[self.match_layer].downsampling
        self._banks: dict[Any, tuple[int, dict[str, SiteBank]]] = {}
        self._regions: dict[Any, Tensor] = {}

    def __deepcopy__(self, memo: dict) -> JointApplication:
        return self

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

    def match(self, k: Tensor, extra: dict) -> None:
        """Adds what the positive prompts' rows take of the references to the step and recorders.

        Args:
            k: keys of `match_layer`, [B, N, D].
        """
        context: StepContext | None = extra.get(step_context.STEP)
        if context is not None and not self._pulls(context):
            return
        bank, step = self._bank(k, context)[MATCHED], extra.get(step_context.TAKEN)
        if step is None:
            return
        # Another pack's guidance may run the layers again in a step: the first batch counts.
        first, found = step.found.setdefault(self, (context, []))
        if first is not context:
            return
        size = tuple(extra["activations_shape"][-2:])
        kinds, areas = chunk_kinds(extra, context), chunk_areas(extra, context)
        for kind, area, keys in zip(kinds, areas, k.chunk(len(kinds)), strict=True):
            height, width = area[:2] if area else context.shape
            # Tokens that a patch merged or tiled do not say where they are.
            if kind != COND or size != (-(-height // self.factor), -(-width // self.factor)):
                continue
            if keys.shape[1] != size[0] * size[1]:
                continue
            taken = take(keys, bank).transpose(1, 2).unflatten(2, size)
            found.append((taken, locate_crop(self.factor, context, area)))
            if recorders := extra.get(RECORDERS):
                shares = self._measure_shares(keys, bank, size, context, area)
                for recorder in recorders:
                    recorder.add(self, shares, self.factor, context, area)

    def _pulls(self, context: StepContext) -> bool:
        acts = strength_at(self.retrieval, context) > 0
        return acts and any(self.retrieval.pull_at(context.progress))

    def _measure_shares(
        self,
        keys: Tensor,
        bank: SiteBank,
        size: tuple[int, int],
        context: StepContext,
        area: Area | None,
    ) -> Tensor:
        """What is taken of each reference [B, 1 + references, h, w], after what is of none."""
        latents = self.network.config.out_channels * self.factor**2
        values = split_owners(bank, latents, len(self.references))
        shares = take(keys, bank, values).transpose(1, 2).unflatten(2, size)
        region = self._region(context, area)
        if region is not None:
            shares = shares * resize_region(region, shares)
        return torch.cat([1 - shares.sum(1, keepdim=True), shares], 1)

    def shift(self, x0: Tensor, text: Tensor | None, step: Taken) -> Tensor | None:
        """The shift of a step's prediction (`find_shift`), or None if nothing was taken."""
        context, found = step.found.get(self, (None, ()))
        if not found:
            return None
        sums = Shares()
        for taken, crop in found:
            sums.add(taken.to(x0.device), *crop)
        taken = sums.total / sums.seen.clamp_min(1)  # 0 where no prompt acts: nothing is taken
        shift = find_shift(x0, taken, text, *self.retrieval.pull_at(context.progress))
        return min(strength_at(self.retrieval, context), 1.0) * shift

    def find_region(self, step: Taken) -> Tensor | None:
        """The region at the resolution of the whole latent, or None for everywhere."""
        return self._region(step.found[self][0], None)

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
            names = (MATCHED, *self.names)
            banks = {name: sites[name_site(name, level)].to(q.device, q.dtype) for name in names}
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
        it for every row of both prompts, or the match."""
        layers = list_self_attention_layers(self.network.config)
        ends = [name_site("", level) for level in self.network.timesteps()]
        banks = self.retrieval.bank.sites
        sizes = {site: bank.keys.numel() + bank.values.numel() for site, bank in banks.items()}
        level = max(sum(n for site, n in sizes.items() if site.endswith(end)) for end in ends)

        def count_positions(name: str) -> int:
            return math.prod(-(-edge // layers[name].downsampling) for edge in noise_shape[2:])

        joined = [
            max(sizes[name + end] for end in ends) + 2 * count_positions(name) * layers[name].width
            for name in self.names
        ]
        size = management.dtype_size(dtype)
        tokens, width = max((banks[MATCHED + end].keys.shape[1:] for end in ends), key=math.prod)
        positions = count_positions(self.match_layer)
        matched = _ALIVE * (tokens + noise_shape[0] * positions) * width
        matched = torch.float32.itemsize * (matched + noise_shape[0] * positions * tokens)
        return level * size + max(2 * noise_shape[0] * max(joined, default=0) * size, matched)


class LatentShift:
    """A post-CFG function that shifts a step's prediction, for one or more applications."""

    def __init__(self, applications: Sequence[JointApplication]):
        self.applications = applications

    def __deepcopy__(self, memo: dict) -> LatentShift:
        return self

    def __call__(self, args: dict[str, Any]) -> Tensor:
        x0, text = args["denoised"], None
        step = args["model_options"].get("transformer_options", {}).get(step_context.TAKEN, Taken())
        if args.get("uncond") is not None:  # zeros take its place where cfg is 1
            text = args["cond_denoised"] - args["uncond_denoised"]
        found = [(one, one.shift(x0, text, step)) for one in self.applications]
        return add_shifts(x0, [(s, one.find_region(step)) for one, s in found if s is not None])


def attach_shift(model: Any, applications: Sequence[JointApplication]) -> None:
    """Adds applications to the post-CFG functions of a MODEL, where they were if it has some."""
    functions = list(model.model_options.get(POST_CFG, ()))
    ours = [i for i, function in enumerate(functions) if isinstance(function, LatentShift)]
    if applications:
        at = ours[0] if ours else len(functions)
        functions[at : at + 1] = [LatentShift(applications)]
        model.model_options[POST_CFG] = functions
