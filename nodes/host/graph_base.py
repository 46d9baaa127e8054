"""The graph's MODEL, VAE and CLIP as the base model of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from ...retrieval_core.data.stages import digest_json
from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.network.fingerprint import fingerprint_weights
from ...retrieval_core.network.unet import UNet, load_strictly
from ...retrieval_core.sampling.noise_schedule import NoiseSchedule
from ...retrieval_core.training.base_checkpoint import Base
from .base_model import check_given, detect_base, fingerprint_base, list_own_weights
from .conditioning import make_vector_conditioning

_TOKENS = 77  # of a prompt, begin and end included, as the command trains


class GraphVae:
    """The graph's VAE as a `LatentCodec`, which the host loads when it is called.

    latent_format: of the base model.
    """

    def __init__(self, vae: Any, latent_format: Any) -> None:
        self.vae, self.latent_format = vae, latent_format

    def encode(self, pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            latents = self.vae.encode(pixels.movedim(1, -1).cpu() / 2 + 0.5)
            latents = self.latent_format.process_in(latents)
        return latents.clone()  # outside: a tensor that gradients may flow past

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, or grey if the user interrupts: the loop has its step to save first."""
        try:
            with torch.inference_mode():
                pictures = self.vae.decode(self.latent_format.process_out(latents.cpu()))
            return pictures.clone().movedim(-1, 1) * 2 - 1
        except management.InterruptProcessingException:
            management.interrupt_current_processing()
            return torch.zeros(len(latents), 3, 8, 8)

    def to(self, device: Any) -> None:
        """Frees the device for training; the host loads its models by itself."""
        if torch.device(device).type == "cpu":
            management.unload_all_models()


class GraphPrompts:
    """The graph's CLIP as a `PromptEncoder`; a prompt is cut off after 75 tokens.

    adm: width of the base's vector conditioning.
    """

    def __init__(self, clip: Any, adm: int | None) -> None:
        self.clip, self.adm = clip, adm

    def encode(
        self, texts: Sequence[str], sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor | None]:
        """See `Base.encode_prompts`; pictures are square."""
        contexts, vectors = [], []
        for text, (size, _) in zip(texts, sizes):
            # Brackets in a tag are no weights.
            tokens = self.clip.tokenize(text, disable_weights=True)
            context, pooled = self.clip.encode_from_tokens(tokens, return_pooled=True)
            contexts.append(context[:, :_TOKENS].float().cpu())
            if self.adm is not None:
                vectors.append(make_vector_conditioning(pooled, size, self.adm).cpu())
        return torch.cat(contexts), torch.cat(vectors) if vectors else None

    def to(self, device: Any) -> None:
        """See `GraphVae.to`."""


def make_base(model: Any, vae: Any, clip: Any) -> Base:
    """The base of a training run: a copy of the MODEL's U-Net, and the VAE and CLIP themselves.

    Raises:
        RetrievalError: a base that retrieval does not support, patched weights, another noise
            schedule than Stable Diffusion's, or a VAE or CLIP of another base.
    """
    found = detect_base(model)
    check_given(vae, clip)
    for patcher, name in ((model, "MODEL"), (clip.patcher, "CLIP")):
        if patches := getattr(patcher, "patches", None):
            raise RetrievalError(
                f"The {name} given has {len(patches)} patched weights, such as a LoRA's, and "
                "training reads the checkpoint's own; connect it as its loader gives it."
            )
    weights, _ = list_own_weights(model)
    with torch.device("meta"):
        unet = UNet(found.config)
    load_strictly(unet.to_empty(device="cpu"), weights, f"U-Net of the '{found.name}' MODEL")
    base = Base(
        unet=unet.eval().requires_grad_(False),
        vae=GraphVae(vae, found.latent_format),
        prompts=GraphPrompts(clip, found.config.adm_in_channels),
        schedule=detect_schedule(model.get_model_object("model_sampling")),
        name=found.name,
        fingerprint=digest_json(
            [
                fingerprint_base(model),
                fingerprint_weights(vae.patcher.model.state_dict()),
                fingerprint_weights(clip.patcher.model.state_dict()),
                clip.layer_idx,
            ]
        ),
    )
    _check_parts(base)
    return base


def _check_parts(base: Base) -> None:
    """Refuses a VAE or a CLIP of another base, by what they make of grey and of no text."""
    channels = base.vae.encode(torch.zeros(1, 3, 64, 64)).shape[1]
    if channels != base.unet.config.out_channels:
        raise RetrievalError(
            f"The VAE given makes latents of {channels} channels and the '{base.name}' MODEL has "
            f"{base.unet.config.out_channels}; connect the VAE of the base model."
        )
    context, _ = base.encode_prompts([""], [(64, 64)])
    if context.shape[-1] != base.unet.config.context_dim:
        raise RetrievalError(
            f"The CLIP given makes text of width {context.shape[-1]} and the '{base.name}' MODEL "
            f"reads {base.unet.config.context_dim}; connect the CLIP of the base model."
        )


def detect_schedule(sampling: Any) -> NoiseSchedule:
    """The core's schedule of the same noise levels and prediction as a MODEL's.

    Raises:
        RetrievalError: there is none.
    """
    sigma, ones = torch.tensor([1.5]), torch.ones(1, 1, 1, 1)
    with torch.inference_mode():
        sigmas = getattr(sampling, "sigmas", ones).double().cpu()
        denoised = sampling.calculate_denoised(sigma, ones, 2 * ones)
    # Zero terminal SNR with eps, which the command refuses as a wrong setting of a checkpoint, is
    # what this MODEL was patched to: the network is trained on the noise that it will be used with,
    # and only the last of its steps teaches nothing.
    for prediction, zero in product(("eps", "v"), (False, True)):
        schedule = NoiseSchedule(prediction=prediction, zero_terminal_snr=zero)
        same = sigmas.shape == (schedule.steps,)
        if same and torch.allclose(sigmas, schedule.sigmas(), rtol=1e-3):
            if torch.allclose(denoised, schedule.denoised(ones, 2 * ones, sigma)):
                return schedule
    raise RetrievalError(
        f"The MODEL given has the noise of '{type(sampling).__name__}' with {len(sigmas)} levels, "
        "and training knows Stable Diffusion's own, with eps or v prediction; connect the "
        "checkpoint's MODEL without sampling patches."
    )
