"""The training-free mode in the host, whose own U-Net encodes the references."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_management as management
import comfy.samplers
import torch
from torch import Tensor

from ...retrieval_core.bank.encoding import Features
from ...retrieval_core.bank.site_bank import Bank, make_bank
from ...retrieval_core.bank.token_budget import Budget
from ...retrieval_core.bank.tokens import MATCHED, Tokens
from ...retrieval_core.data.prepare import PreparedReference
from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.sampling.controls import Controls
from ...retrieval_core.sampling.presets import Preset
from ...retrieval_core.training_free import JointRetrieval, TrainingFree, make_fixed_noise
from ...retrieval_core.training_free.latent_pull import make_match_tokens
from ...retrieval_core.training_free.subject_mask import find_subjects
from ...retrieval_core.training_free.training_free_network import LAYERS, LEVELS, name_site
from . import step_context
from .attention import bind_attention
from .base_model import detect_base, fingerprint_base, identify_model
from .conditioning import make_vector_conditioning
from .joint_application import LAST, JointApplication
from .loading import make_bank_on_device
from .reference_network import ReferenceNetwork
from .self_attention import ATTN1, attach_joint_attention, parse_layer_name

# Copies of a site's tokens alive at once while they are merged.
_ALIVE = 4


@dataclass(eq=False)
class TrainingFreeModel(ReferenceNetwork):
    """A base model as its own `ReferenceNetwork`; `model` is the MODEL that encodes references."""

    model: Any

    @property
    def identity(self) -> Any:
        """Encoded references also depend on LoRAs on the model."""
        return identify_model(self.model)

    def site_downsampling(self) -> Mapping[str, int]:
        return self.network.site_downsampling()

    def encode(self, latent: Tensor, context: Tensor, pooled: Tensor | None, size: int) -> Features:
        more: dict[str, Any] = {} if pooled is None else {"pooled_output": pooled}
        if self.config.adm_in_channels is not None:
            make_vector_conditioning(pooled, size, self.config.adm_in_channels)
            more |= {"width": size, "height": size, "target_width": size, "target_height": size}
        sampler = _LayerRecorder(self.network, latent)
        guider = comfy.samplers.CFGGuider(sampler.attach(self.model))
        guider.inner_set_conds({"positive": [[context, more]]})
        noise, nothing = make_fixed_noise(latent.shape), torch.zeros_like(latent)
        guider.sample(noise, nothing, sampler, torch.ones(2), disable_pbar=True, seed=0)
        return sampler.recorded

    def find_subject(self, features: Features, reference: PreparedReference) -> Tensor | None:
        (mask,) = find_subjects(features, reference.image[None], [reference.mask])
        return mask

    def make_bank(self, tokens: Tokens, budget: Budget) -> Bank:
        if budget is not None:
            needed = _ALIVE * torch.float32.itemsize * tokens.count_largest()
            management.free_memory(needed, management.get_torch_device())
        factors = self.site_downsampling()
        return make_bank_on_device(partial(make_bank, tokens, None, factors, budget))

    def apply(
        self,
        model: Any,
        references: Any,
        controls: Controls,
        scale: float,
        preset: Preset,
        **acting: Any,
    ) -> Any:
        """See `ReferenceNetwork`.

        Raises:
            RetrievalError: the references were encoded by another checkpoint than the MODEL's.
        """
        read_by, applied_to = self.network.base_fingerprint, fingerprint_base(model)
        if read_by != applied_to:
            raise RetrievalError(
                f"The references were read by another checkpoint (weights {read_by[:8]}) than the "
                f"model they are applied to (weights {applied_to[:8]}); connect the same "
                "checkpoint to Load Retrieval ControlNet and encode the references again."
            )
        retrieval = JointRetrieval(
            references.bank(controls.token_budget),
            site_strength=controls.site_strengths(self.network.groups()),
            match_layer=self.network.match_layer,
            preset=preset,
            timesteps=self.network.timesteps(),
            adain=self.network.adain,
            **acting,
        )
        application = JointApplication(self.network, retrieval, references.described())
        patched = model.clone()
        attach_joint_attention(patched, self.config, retrieval, application)
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
    return TrainingFreeModel("training-free", chosen, chosen.maker, base.latent_format, model)


class _LayerRecorder(comfy.samplers.Sampler):
    """A sampler that evaluates a latent once at each noise level and records layers.

    The latent bypasses the guider, which would scale it a second time.
    """

    def __init__(self, network: TrainingFree, latent: Tensor):
        self.network, self.latent = network, latent
        self.level = 0
        self.recorded: dict[str, tuple[Tensor, tuple[int, int]]] = {}

    def attach(self, model: Any) -> Any:
        """Clones the MODEL with recorders of its layers."""
        clone = model.clone()
        replaced = clone.model_options["transformer_options"].get("patches_replace", {})
        for name in self.network.recorded:
            block = parse_layer_name(name)
            before = replaced.get(ATTN1, {}).get(block)
            clone.set_model_attn1_replace(self._make_patch(name, before), *block)
        return clone

    def _make_patch(self, name: str, before: Callable | None) -> Callable[..., Tensor]:
        """An attn1 replacement that copies the keys and values of one layer to the CPU."""

        @torch.compiler.disable
        def record(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
            site = name_site(name, self.level)
            # Other packs' guidance may run the layers again with changes: the first pass counts.
            if site not in self.recorded:
                height, width = extra["activations_shape"][-2:]
                keys, size = k.cpu(), (height, width)
                self.recorded[site] = torch.stack([keys, v.cpu()], 1), size
                if name == self.network.match_layer:
                    tokens = make_match_tokens(keys, self.latent.cpu(), size)
                    self.recorded[name_site(MATCHED, self.level)] = tokens, size
            if before is not None:
                return before(q, k, v, extra)
            return bind_attention(extra)(q, k, v, extra["n_heads"])

        return record

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
        return latent_image
