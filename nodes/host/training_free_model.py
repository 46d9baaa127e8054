"""The training-free mode in the host, whose own U-Net encodes the references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_management as management
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...retrieval_core.bank.bank_file import Maker
from ...retrieval_core.bank.encoding import split_features
from ...retrieval_core.bank.site_bank import Bank, make_bank
from ...retrieval_core.bank.token_budget import Budget
from ...retrieval_core.bank.tokens import EncodedReference, Tokens
from ...retrieval_core.data.prepare import PreparedReference
from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.network.unet import UNetConfig
from ...retrieval_core.sampling.controls import Controls
from ...retrieval_core.training_free import JointRetrieval, TrainingFree, make_fixed_noise
from ...retrieval_core.training_free.training_free_network import LAYERS, LEVELS, name_site
from . import step_context
from .attention import bind_attention
from .base_model import detect_base, fingerprint_base, identify_model
from .conditioning import make_vector_conditioning
from .joint_application import LAST, JointApplication
from .loading import make_bank_on_device
from .self_attention import ATTN1, attach_joint_attention, parse_layer_name

# Copies of a site's tokens alive at once while they are merged.
_ALIVE = 4


@dataclass(frozen=True, eq=False)
class TrainingFreeModel:
    """A base model as its own `ReferenceNetwork`.

    Attributes:
        network: the choice of layers and noise levels.
        model: the MODEL that encodes the references.
        latent_format: of the base model.
    """

    network: TrainingFree
    model: Any
    latent_format: Any
    name: str = "training-free"

    @property
    def base(self) -> str:
        return self.network.base

    @property
    def config(self) -> UNetConfig:
        return self.network.config

    @property
    def recommended(self) -> dict[str, Any]:
        return self.network.card.recommended

    @property
    def maker(self) -> Maker:
        return self.network.maker

    @property
    def identity(self) -> Any:
        """Encoded references also depend on LoRAs on the model."""
        return identify_model(self.model)

    def __deepcopy__(self, memo: dict) -> TrainingFreeModel:
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
        """See `ReferenceNetwork`; one evaluation by the host's guider per reference and level."""
        more: dict[str, Any] = {} if pooled is None else {"pooled_output": pooled}
        if self.config.adm_in_channels is not None:
            make_vector_conditioning(pooled, size, self.config.adm_in_channels)
            more |= {"width": size, "height": size, "target_width": size, "target_height": size}
        progress = comfy.utils.ProgressBar(len(prepared) * self.network.levels)
        encoded = []
        for latent, reference in zip(latents, prepared, strict=True):
            sampler = _LayerRecorder(self.network, latent[None], progress)
            guider = comfy.samplers.CFGGuider(sampler.attach(self.model))
            guider.inner_set_conds({"positive": [[context, more]]})
            noise, nothing = make_fixed_noise(latent[None].shape), torch.zeros_like(latent[None])
            guider.sample(noise, nothing, sampler, torch.ones(2), disable_pbar=True, seed=0)
            encoded += split_features(
                sampler.recorded, latent.shape[1:], [reference.mask], concepts=[concept]
            )
        return encoded

    def make_bank(self, tokens: Tokens, budget: Budget) -> Bank:
        """See `ReferenceNetwork`; on the CPU if the device is out of memory."""
        if budget is not None:
            needed = _ALIVE * torch.float32.itemsize * tokens.count_largest()
            management.free_memory(needed, management.get_torch_device())
        make = partial(make_bank, tokens, None, self.network.site_downsampling(), budget)
        return make_bank_on_device(make)

    def apply(
        self, model: Any, references: Any, controls: Controls, scale: float, **acting: Any
    ) -> Any:
        """See `ReferenceNetwork`.

        Raises:
            RetrievalError: the references were encoded by another checkpoint than the MODEL's.
        """
        if fingerprint_base(model) != self.network.base_fingerprint:
            raise RetrievalError(
                "The references were read by another checkpoint than the model they are applied "
                "to; connect the same checkpoint to Load Retrieval ControlNet and encode the "
                "references again."
            )
        retrieval = JointRetrieval(
            references.bank(controls.token_budget),
            site_strength=controls.site_strengths(self.network.groups()),
            timesteps=self.network.timesteps(),
            adain=self.network.adain,
            **acting,
        )
        application = JointApplication(self.network, retrieval, len(references.encoded))
        patched = model.clone()
        attach_joint_attention(patched, self.config, application, application.region)
        step_context.attach(patched, application)
        return patched


def use_training_free(
    model: Any, layers: str = LAYERS, levels: int = LEVELS, adain: bool = False
) -> TrainingFreeModel:
    """The training-free mode on a MODEL; see `TrainingFree`.

    Raises:
        RetrievalError: an unsupported model, or see `TrainingFree`.
    """
    base = detect_base(model)
    chosen = TrainingFree(base.config, base.name, fingerprint_base(model), layers, levels, adain)
    return TrainingFreeModel(chosen, model, base.latent_format)


class _LayerRecorder(comfy.samplers.Sampler):
    """A sampler that evaluates a latent once at each noise level and records the chosen layers.

    The latent bypasses the guider, which would scale it a second time.
    """

    def __init__(self, network: TrainingFree, latent: Tensor, progress: Any):
        self.network, self.latent, self.progress = network, latent, progress
        self.level = 0
        self.recorded: dict[str, tuple[Tensor, tuple[int, int]]] = {}

    def attach(self, model: Any) -> Any:
        """Clones the MODEL with recorders of its chosen layers."""
        clone = model.clone()
        replaced = clone.model_options["transformer_options"].get("patches_replace", {})
        for name in self.network.names:
            block = parse_layer_name(name)
            before = replaced.get(ATTN1, {}).get(block)
            clone.set_model_attn1_replace(_RecordLayer(self, name, before), *block)
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


class _RecordLayer:
    """An attn1 replacement that copies the keys and values of one layer to the CPU."""

    def __init__(self, recorder: _LayerRecorder, name: str, before: Callable | None):
        self.recorder, self.name, self.before = recorder, name, before

    def __deepcopy__(self, memo: dict) -> _RecordLayer:
        return self

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        site = name_site(self.name, self.recorder.level)
        # Other packs' guidance may run the layers again with changes: the first pass counts.
        if site not in self.recorder.recorded:
            height, width = extra["activations_shape"][-2:]
            self.recorder.recorded[site] = torch.stack([k.cpu(), v.cpu()], 1), (height, width)
        if self.before is not None:
            return self.before(q, k, v, extra)
        return bind_attention(extra)(q, k, v, extra["n_heads"])
