"""The training-free mode in the host: its own U-Net reads the references and attends to them.

The value of RETRIEVAL_CONTROLNET is here a `TrainingFreeNetwork`; it encodes and applies itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management as management
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ...retrieval_core.bank.bank_file import Maker, fingerprint_of
from ...retrieval_core.bank.encoding import split
from ...retrieval_core.bank.site_bank import Bank
from ...retrieval_core.bank.tokens import EncodedReference
from ...retrieval_core.data.prepare import PreparedReference
from ...retrieval_core.sampling.applications import Guidance
from ...retrieval_core.sampling.controls import Controls
from ...retrieval_core.training_free import JointRetrieval, TrainingFree, fixed_noise
from ...retrieval_core.training_free.training_free_network import LAYERS, LEVELS, site_name
from . import environment as host
from . import step
from .joint_application import Application
from .self_attention import ATTN1, LAST, attach, attention_of, block_of

NAME = "training-free"

fingerprints: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class TrainingFreeNetwork:
    """A base model as its own retrieval network; immutable. Its interface is `network.Network`'s.

    Attributes:
        network: the choice of layers and noise levels.
        model: the MODEL that reads the references.
        latent_format: of the base model.
    """

    network: TrainingFree
    model: Any
    latent_format: Any
    name: str = NAME
    layers: None = None  # references hold keys and values

    @property
    def base(self) -> str:
        return self.network.base

    @property
    def fingerprint(self) -> str:
        return self.network.fingerprint

    @property
    def maker(self) -> Maker:
        """What saved references are bound to."""
        return Maker.of(self.network)

    @property
    def identity(self) -> Any:
        """What encoded references depend on beside the fingerprint: LoRAs on the model."""
        return host.identity(self.model)

    @property
    def latent_channels(self) -> int:
        """Of the references' latents; an inpainting model's own input has more."""
        return self.latent_format.latent_channels

    def __deepcopy__(self, memo: dict) -> TrainingFreeNetwork:
        return self

    def get_ram_usage(self) -> int:
        """Bytes, for the host's cache: the model is counted where it was loaded."""
        return 0

    def encode(
        self,
        prepared: Sequence[PreparedReference],
        context: Tensor,
        pooled: Tensor | None,
        latents: Tensor,
        concept: str,
        size: int,
    ) -> list[EncodedReference]:
        """Each reference read by the model at each noise level, on the host's own path.

        Args:
            context: [1, L, D] of the concept. pooled: its pooled output where the CLIP has one.
            latents: [R, C, h, w], clean, scaled as the model's are. size: of the pictures.
        """
        more: dict[str, Any] = {} if pooled is None else {"pooled_output": pooled}
        if self.network.config.adm_in_channels is not None:
            host.vector_conditioning(pooled, size, self.network.config.adm_in_channels)
            more |= {"width": size, "height": size, "target_width": size, "target_height": size}
        progress = comfy.utils.ProgressBar(len(prepared) * self.network.levels)
        encoded = []
        for latent, reference in zip(latents, prepared, strict=True):
            reading = _Reading(self.network, latent[None], progress)
            guider = comfy.samplers.CFGGuider(reading.on(self.model))
            guider.inner_set_conds({"positive": [[context, more]]})
            noise, nothing = fixed_noise(latent[None].shape), torch.zeros_like(latent[None])
            guider.sample(noise, nothing, reading, torch.ones(2), disable_pbar=True, seed=0)
            encoded += split(reading.recorded, [reference.mask], concepts=[concept])
        return encoded

    def apply(
        self,
        model: Any,
        references: Any,
        strength: float,
        start: float,
        end: float,
        guidance: Guidance,
        region: Tensor | None,
        controls: Controls,
    ) -> Any:
        """See `patch.apply`, which has checked model, guidance and region."""
        retrieval = JointRetrieval(
            {},
            Bank(),
            strength,
            start,
            end,
            guidance,
            region,
            controls.curve,
            controls.site_strengths(self.network.groups()),
            timesteps=self.network.timesteps(),
            adain=self.network.adain,
            apart=controls.apart,
        )
        patched = model.clone()
        if strength == 0 or not any(controls.groups) or not references.encoded:
            return patched
        bank = references.bank(controls.token_budget)
        application = Application(
            self.network, replace(retrieval, bank=bank), len(references.encoded)
        )
        attach(patched, self.network.config, application, application.region)
        patched.add_callback_with_key(CallbacksMP.ON_CLEANUP, step.KEY, application.cleanup)
        patched.add_wrapper_with_key(
            WrappersMP.PREPARE_SAMPLING, step.KEY, application.prepare_sampling
        )
        step.add_wrappers(patched)
        return patched


def training_free(
    model: Any, layers: str = LAYERS, levels: int = LEVELS, adain: bool = False
) -> TrainingFreeNetwork:
    """The training-free mode on a MODEL; see `TrainingFree`.

    Raises:
        RetrievalError: an unsupported model, a choice of layers that there is not, or a number of
            levels below 1.
    """
    base = host.detect_base(model)
    if model.model not in fingerprints:
        weights = dict(model.get_model_object("diffusion_model").state_dict())
        for key, kept in model.backup.items():  # weights that a LoRA has changed in place
            name = key.removeprefix("diffusion_model.")
            if name in weights:
                weights[name] = kept.weight
        fingerprints[model.model] = fingerprint_of(weights)
    print_of = fingerprints[model.model]
    chosen = TrainingFree(base.config, base.name, print_of, layers, levels, adain)
    return TrainingFreeNetwork(chosen, model, base.latent_format)


class _Reading(comfy.samplers.Sampler):
    """Stands in a sampler's place: one evaluation of a clean latent at each noise level, recorded.

    The latent does not go through the guider, which would scale it a second time.
    """

    def __init__(self, network: TrainingFree, latent: Tensor, progress: Any):
        self.network, self.latent, self.progress = network, latent, progress
        self.level = 0
        self.recorded: dict[str, tuple[Tensor, tuple[int, int]]] = {}

    def on(self, model: Any) -> Any:
        """A clone of the MODEL whose chosen layers report here."""
        clone = model.clone()
        held = clone.model_options["transformer_options"].get("patches_replace", {})
        for name in self.network.names:
            block = block_of(name)
            before = held.get(ATTN1, {}).get(block)
            clone.set_model_attn1_replace(_Recording(self, name, before), *block)
        return clone

    def sample(
        self,
        model_wrap: Any,
        sigmas: Any,
        extra_args: dict,
        callback: Any,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Any = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        sampling = model_wrap.inner_model.model_sampling
        for timestep in self.network.timesteps():
            management.throw_exception_if_processing_interrupted()
            self.level = timestep
            sigma = torch.tensor([float(sampling.percent_to_sigma(1 - timestep / LAST))])
            sigma = sigma.to(noise)
            noised = sampling.noise_scaling(sigma, noise, self.latent.to(noise), False)
            model_wrap(noised, sigma.expand(len(noised)), **extra_args)
            self.progress.update(1)
        return latent_image


class _Recording:
    """An attn1 replacement that keeps the keys and values of one layer on the CPU."""

    def __init__(self, reading: _Reading, name: str, before: Callable | None):
        self.reading, self.name, self.before = reading, name, before

    def __deepcopy__(self, memo: dict) -> _Recording:
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        site = site_name(self.name, self.reading.level)
        # Guidance of other packs may run the layers again, differently: the first pass counts.
        if site not in self.reading.recorded:
            height, width = extra["activations_shape"][-2:]
            self.reading.recorded[site] = torch.stack([k.cpu(), v.cpu()], 1), (height, width)
        if self.before is not None:
            return self.before(q, k, v, extra)
        return attention_of(extra)(q, k, v, extra["n_heads"])
