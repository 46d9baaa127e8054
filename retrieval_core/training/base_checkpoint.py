"""Loads the base model of a training run: U-Net, VAE, text encoder and noise schedule.

Checkpoints are single safetensors files in the original layout of SD 1.x, SD 2.x or SDXL,
inpainting variants included. diffusers' own functions convert VAE and text encoders to its layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import RetrievalError, explain, import_library
from ..metrics.pretrained import LOCAL, load_model
from ..network.unet import UNet, detect_config, load_strictly, timestep_embedding
from ..sampling.noise_schedule import NoiseSchedule, Prediction
from .run_config import RunConfig

TOKENIZER = "openai/clip-vit-large-patch14"
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
# (context width, width of the vector conditioning) of each base.
_NAMES = {(768, None): "sd15", (1024, None): "sd21", (2048, 2816): "sdxl"}
_SCALES = {"sd15": 0.18215, "sd21": 0.18215, "sdxl": 0.13025}
# Where the checkpoint has each text encoder; the ones of OpenCLIP have "model" in their names.
_ENCODERS = {
    "sd15": ("cond_stage_model.transformer.",),
    "sd21": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
_LENGTH = 77  # tokens of a prompt, begin and end included


class LatentCodec(Protocol):
    """The VAE: pixels [B, 3, H, W] in -1..1 to latents, scaled for the U-Net, and back."""

    def encode(self, pixels: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def to(self, *args: Any, **kw: Any) -> Any: ...


class PromptEncoder(Protocol):
    """The text encoder; see `Base.encode_prompts`."""

    def encode(
        self, texts: Sequence[str], sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor | None]: ...
    def to(self, *args: Any, **kw: Any) -> Any: ...


@dataclass(frozen=True, eq=False)
class Base:
    """A base model, all of its parts frozen and on the CPU.

    Attributes:
        vae, prompts: needed only until latents and prompts are cached.
        name: one of `controlnet.BASES`.
        fingerprint: SHA-256 of the checkpoint's file; with another VAE or text encoder, of the
            digests of all files.
        channel_weights: [C], weights that the base's own training gave to errors in the latent's
            channels; None: all 1, as of Stable Diffusion.
    """

    unet: UNet
    vae: LatentCodec
    prompts: PromptEncoder
    schedule: NoiseSchedule
    name: str
    fingerprint: str
    channel_weights: Tensor | None = None

    def encode_prompts(
        self, texts: Sequence[str], sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor | None]:
        """Context [B, L, D] and vector conditioning [B, A] (None without one) of B prompts.

        Args:
            sizes: height and width of each text's picture, which SDXL is conditioned on: as its
                original size and its target size, not cropped, as the host does.
        """
        return self.prompts.encode(texts, sizes)


class DiffusersVAE(nn.Module):
    """diffusers' AutoencoderKL as a `LatentCodec`; latents are the mean of the posterior."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.model.device, self.model.dtype)
        return self.scale * self.model.encode(pixels).latent_dist.mean

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.model.device, self.model.dtype)
        return self.model.decode(latents / self.scale).sample


class ClipPrompts(nn.Module):
    """CLIP text encoders as a `PromptEncoder`; a prompt is cut off after 75 tokens.

    Args:
        encoders: CLIP and OpenCLIP models of transformers; of two (SDXL) the contexts are those of
            the last layer but one, concatenated, and the second one gives the vector conditioning.
    """

    def __init__(self, tokenizer: Any, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.tokenizer, self.encoders = tokenizer, nn.ModuleList(encoders)

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor | None]:
        """See `Base.encode_prompts`."""
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=_LENGTH,
            truncation=True,
            return_tensors="pt",
        )
        outputs = []
        for encoder in self.encoders:
            ids = tokens.input_ids
            if encoder.config.hidden_act == "gelu":  # OpenCLIP was trained with 0 as padding
                ids = ids * tokens.attention_mask
            outputs.append(encoder(ids.to(encoder.device), output_hidden_states=True))
        if len(outputs) == 1:
            return outputs[0].last_hidden_state, None
        context = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        pooled = outputs[1].text_embeds
        numbers = torch.tensor([[*size, 0, 0, *size] for size in sizes], device=pooled.device)
        size = timestep_embedding(numbers.flatten(), 256).view(len(numbers), -1)
        return context, torch.cat([pooled, size.to(pooled)], -1)


def load_base(config: RunConfig, dtype: torch.dtype = torch.float32) -> Base:
    """Loads the base model that a run's settings name.

    Args:
        dtype: of the U-Net's weights; VAE and text encoder are float32.

    Raises:
        RetrievalError: the file is not a whole safetensors checkpoint of a supported family, or
            lacks a part that the settings do not name; a package is missing.
    """
    with _open_checkpoint(config.base) as file:
        keys, metadata = set(file.keys()), dict(file.metadata() or {})

        def read(prefix: str) -> dict[str, Tensor]:
            return {key: file.get_tensor(key) for key in sorted(keys) if key.startswith(prefix)}

        weights = {key.removeprefix(_UNET): t.to(dtype) for key, t in read(_UNET).items()}
        unet, name = _build_unet(weights, config.base)
        schedule = _detect_schedule(config, name, keys, metadata, weights)
        vae_weights = {} if config.vae else read(_VAE)
        texts = [{} if config.text_encoder else read(prefix) for prefix in _ENCODERS[name]]
    vae = _load_vae(config, vae_weights, _SCALES[name])
    prompts = ClipPrompts(_load_tokenizer(config), _load_encoders(config, name, texts))
    _check_prompts(prompts, unet)
    return Base(unet, vae, prompts.eval(), schedule, name, _fingerprint_files(config))


def _open_checkpoint(path: Path) -> Any:
    if path.is_dir() or path.suffix != ".safetensors":
        raise RetrievalError(
            f"The base '{path}' is not a safetensors file; give a single checkpoint file ending in "
            ".safetensors, because other formats can run code."
        )
    if not path.is_file():
        raise RetrievalError(f"There is no base '{path}'; check the name and the folder.")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise RetrievalError(
            f"'{path}' is not a whole safetensors file ({explain(error)}); download or copy it "
            "again."
        ) from error


def _build_unet(weights: dict[str, Tensor], path: Path) -> tuple[UNet, str]:
    """The frozen U-Net and the base's name."""
    if not weights:
        raise RetrievalError(
            f"'{path}' has no weights named '{_UNET}*'; give a whole checkpoint of SD 1.x, "
            "SD 2.x or SDXL in its original layout, not a part or diffusers' layout."
        )
    config = detect_config(weights)
    name = _NAMES.get((config.context_dim, config.adm_in_channels))
    if name is None:
        raise RetrievalError(
            f"The U-Net of '{path}' has a context of width {config.context_dim} and a vector "
            f"conditioning of {config.adm_in_channels}, which is no SD 1.x, SD 2.x or SDXL base "
            "model; give a checkpoint of one."
        )
    with torch.device("meta"):
        unet = UNet(config, dtype=next(iter(weights.values())).dtype)
    load_strictly(unet.to_empty(device="cpu"), weights, f"U-Net of '{path}'")
    return unet.eval().requires_grad_(False), name


def _detect_schedule(
    config: RunConfig,
    name: str,
    keys: set[str],
    metadata: dict[str, str],
    weights: dict[str, Tensor],
) -> NoiseSchedule:
    """The schedule that the base was trained with, as far as the settings do not say it.

    Raises:
        RetrievalError: a schedule of another kind (EDM), or zero terminal SNR with eps.
    """
    if keys & {"edm_mean", "edm_vpred.sigma_max"}:
        raise RetrievalError(
            f"'{config.base}' was trained with the noise of EDM, which training does not support; "
            "give a checkpoint with SDXL's own schedule."
        )
    prediction: Prediction | None = config.prediction
    if prediction is None:
        told = metadata.get("modelspec.prediction_type")
        norm = weights.get("output_blocks.11.1.transformer_blocks.0.norm1.bias")
        if told is not None:
            prediction = "v" if told.startswith("v") else "eps"
        elif name == "sd21" and norm is not None:
            # ComfyUI's way to tell SD 2.x's two kinds, of the same shapes, apart.
            prediction = "v" if norm.float().std(correction=0) > 0.09 else "eps"
        else:
            prediction = "v" if "v_pred" in keys else "eps"
    zero = config.zero_terminal_snr
    if zero is None:
        zero = "ztsnr" in keys
    if zero and prediction == "eps":
        raise RetrievalError(
            "A schedule with zero terminal SNR cannot train a base that predicts eps, because its "
            "last step is noise alone; leave zero_terminal_snr out or set prediction to 'v'."
        )
    return NoiseSchedule(prediction=prediction, zero_terminal_snr=zero)


def _load_vae(config: RunConfig, weights: dict[str, Tensor], scale: float) -> DiffusersVAE:
    diffusers = import_library("diffusers", "train")
    if config.vae is not None and config.vae.is_dir():
        try:
            model = diffusers.AutoencoderKL.from_pretrained(
                config.vae, use_safetensors=True, local_files_only=True
            )
        except Exception as error:  # a damaged folder raises a dozen classes
            raise RetrievalError(
                f"The VAE in '{config.vae}' cannot be loaded ({explain(error)}); give a folder "
                "with config.json and diffusion_pytorch_model.safetensors, or a safetensors file."
            ) from error
        return DiffusersVAE(model.float().eval().requires_grad_(False), scale)
    if config.vae is not None:
        with _open_checkpoint(config.vae) as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}
    weights = {k.removeprefix(_VAE): w.float() for k, w in weights.items()}
    if "encoder.conv_in.weight" not in weights:
        raise RetrievalError(
            f"'{config.vae or config.base}' holds no VAE; name one with the setting vae."
        )
    convert = import_library("diffusers.loaders.single_file_utils", "train")
    shape = _describe_vae(weights)
    model = diffusers.AutoencoderKL(**shape)
    load_strictly(model, convert.convert_ldm_vae_checkpoint(weights, shape), "VAE")
    return DiffusersVAE(model.eval().requires_grad_(False), scale)


def _describe_vae(weights: dict[str, Tensor]) -> dict[str, Any]:
    """diffusers' configuration of a VAE, from its weights in the original layout."""
    widths = []
    while (first := f"encoder.down.{len(widths)}.block.0.conv1.weight") in weights:
        widths.append(weights[first].shape[0])
    layers = sum(f"encoder.down.0.block.{n}.conv1.weight" in weights for n in range(10))
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": layers,
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
    }


def _load_encoders(
    config: RunConfig, name: str, texts: Sequence[dict[str, Tensor]]
) -> list[nn.Module]:
    """The text encoders of the folder that the settings name, or of the checkpoint's weights."""
    import_library("transformers", "train")
    kinds = ["CLIPTextModel", "CLIPTextModelWithProjection"][: len(texts)]
    folder = config.text_encoder
    if folder is not None:
        homes = [folder / part for part in ("text_encoder", "text_encoder_2")[: len(texts)]]
        if len(texts) == 1 and not homes[0].is_dir():
            homes = [folder]
        return [load_model(kind, home) for kind, home in zip(kinds, homes)]
    for prefix, weights in zip(_ENCODERS[name], texts):
        if not weights:
            raise RetrievalError(
                f"'{config.base}' has no text encoder '{prefix}*'; name one with the setting "
                "text_encoder."
            )
    return [
        _build_encoder(kind, prefix, weights)
        for kind, prefix, weights in zip(kinds, _ENCODERS[name], texts)
    ]


def _build_encoder(kind: str, prefix: str, weights: dict[str, Tensor]) -> nn.Module:
    """A text encoder from its weights in the checkpoint's layout.

    Of SD 2.x, diffusers' conversion leaves out the last layer, which its U-Net does not read.
    """
    transformers = import_library("transformers", "train")
    convert = import_library("diffusers.loaders.single_file_utils", "train")
    weights = {key: weight.float() for key, weight in weights.items()}
    is_open = prefix.endswith("model.")
    if is_open:
        width = weights[f"{prefix}positional_embedding"].shape[1]
        like = SimpleNamespace(config=transformers.CLIPTextConfig(hidden_size=width))
        converted = convert.convert_open_clip_checkpoint(like, weights, prefix)
        if kind == "CLIPTextModel":
            converted.pop("text_projection.weight", None)
    else:
        converted = {
            f"text_model.{key.removeprefix('text_model.')}": weight  # missing in old checkpoints
            for key, weight in convert.convert_ldm_clip_checkpoint(weights).items()
        }
        converted.pop("text_model.embeddings.position_ids", None)
    words, width = converted["text_model.embeddings.token_embedding.weight"].shape
    layers = [weight for key, weight in converted.items() if key.endswith("mlp.fc1.weight")]
    shape = transformers.CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=len(layers[0]),
        num_hidden_layers=len(layers),
        num_attention_heads=width // 64,
        hidden_act="gelu" if is_open else "quick_gelu",
        projection_dim=width,
        eos_token_id=words - 1,  # the last word of CLIP's vocabulary ends a text
    )
    model = getattr(transformers, kind)(shape)
    load_strictly(model, converted, "text encoder")
    return model.eval().requires_grad_(False)


def _load_tokenizer(config: RunConfig) -> Any:
    """The tokenizer that the settings name, that of the text encoder's folder, or the hub cache's.

    Raises:
        RetrievalError: there is none.
    """
    transformers = import_library("transformers", "train")
    name = config.tokenizer
    if name is None and config.text_encoder is not None:
        beside = [config.text_encoder / "tokenizer", config.text_encoder]
        name = next((str(one) for one in beside if (one / "merges.txt").is_file()), None)
    name = name or TOKENIZER
    try:
        return transformers.CLIPTokenizer.from_pretrained(name, **LOCAL)
    except Exception as error:  # a missing or damaged folder raises a dozen classes
        raise RetrievalError(
            f"The tokenizer '{name}' cannot be loaded ({explain(error)}); give a folder with "
            "CLIP's vocab.json and merges.txt as the setting tokenizer, such as ComfyUI's "
            f"comfy/sd1_tokenizer, or download {TOKENIZER} once."
        ) from error


def _check_prompts(prompts: ClipPrompts, unet: UNet) -> None:
    """Refuses a tokenizer of another vocabulary and text encoders of another width."""
    width = 0
    for encoder in prompts.encoders:
        width += encoder.config.hidden_size
        words = encoder.config.vocab_size
        if len(prompts.tokenizer) != words:
            raise RetrievalError(
                f"The tokenizer knows {len(prompts.tokenizer)} words and the text encoder {words}; "
                "give CLIP's tokenizer and the base's own text encoder."
            )
    if width != unet.config.context_dim:
        raise RetrievalError(
            f"The text encoder gives contexts of width {width} and the U-Net takes "
            f"{unet.config.context_dim}; give the base's own text encoder."
        )


def _fingerprint_files(config: RunConfig) -> str:
    """See `Base`."""
    files = [config.base]
    for part in (config.vae, config.text_encoder):
        if part is not None:
            files += sorted(part.rglob("*.safetensors")) if part.is_dir() else [part]
    first, *others = [_hash_file(file) for file in files]
    return hashlib.sha256("".join([first, *others]).encode()).hexdigest() if others else first


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
