"""Small base checkpoints with the true key names, and CLIP tokenizers of a few words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from retrieval_core.network.unet import UNet, UNetConfig

# The widths of context and vector conditioning are the true ones: they tell the bases apart.
SHAPES = {
    "sd15": UNetConfig(32, (1, 2), (1, 1), (1, 0), 1, 768, num_heads=8),
    "sd21": UNetConfig(
        64, (1, 1, 1, 1), (2, 2, 2, 2), (1, 0, 0, 0), 0, 1024, num_head_channels=64,
        use_linear_in_transformer=True,
    ),
    "sdxl": UNetConfig(
        64, (1, 2), (1, 1), (0, 1), 1, 2048, num_head_channels=64, use_linear_in_transformer=True,
        adm_in_channels=2816,
    ),
}  # fmt: skip
# (width, where the checkpoint has it) of each text encoder.
ENCODERS = {
    "sd15": ((768, "cond_stage_model.transformer."),),
    "sd21": ((1024, "cond_stage_model.model."),),
    "sdxl": (
        (768, "conditioner.embedders.0.transformer."),
        (1280, "conditioner.embedders.1.model."),
    ),
}


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """The module, frozen, with small random weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.requires_grad_(False).parameters():
        parameter.normal_(generator=generator).mul_(0.05)
    return module.eval()


def make_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return randomise(
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=[32, 64],
            layers_per_block=1,
            latent_channels=4,
        ),
        1,
    )


def write_tokenizer(folder: Path) -> int:
    """A CLIP tokenizer that knows single bytes and "ca", "cat"; returns its number of words."""
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{one}</w>" for one in letters), "ca", "cat</w>"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return len(words)


def make_encoders(name: str, words: int) -> list[nn.Module]:
    """Text encoders of the true widths with few layers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    encoders = []
    for kind, (width, prefix) in zip((CLIPTextModel, CLIPTextModelWithProjection), ENCODERS[name]):
        shape = CLIPTextConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=width // 64,
            hidden_act="gelu" if prefix.endswith("model.") else "quick_gelu",
            projection_dim=width,
            eos_token_id=words - 1,
        )
        encoders.append(randomise(kind(shape), width))
    return encoders


def rename_vae(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names -> those of the original VAE, with 2 levels."""
    renamed = {}
    for name, weight in weights.items():
        name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{1 - int(found[1])}", name)
        name = name.replace("down_blocks", "down")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda f: f"mid.block_{int(f[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("resnets", "block")
        name = re.sub(r"(down|up)samplers\.0", r"\1sample", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "attn_1" in name:
            name = name.replace("group_norm", "norm").replace("to_out.0", "proj_out")
            name = re.sub(r"to_([qkv])", r"\1", name)
            weight = weight[..., None, None] if weight.ndim == 2 else weight
        renamed[name] = weight
    return renamed


def rename_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names -> OpenCLIP's."""
    renamed = {"logit_scale": torch.tensor(4.6)}
    for name, weight in weights.items():
        name = name.removeprefix("text_model.")
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            parts = [weights[f"text_model.{name.replace('q_proj', p)}"] for p in PROJECTIONS]
            name, weight = name.replace("q_proj.", "in_proj_"), torch.cat(parts)
        name = name.replace("encoder.layers.", "transformer.resblocks.")
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        renamed[name] = weight.T if name == "text_projection" else weight
    renamed.setdefault("text_projection", torch.zeros([renamed["ln_final.bias"].shape[0]] * 2))
    return renamed


PROJECTIONS = ("q_proj", "k_proj", "v_proj")
OPEN_CLIP = {
    "self_attn": "attn",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
}


def make_checkpoint(name: str, words: int, config: UNetConfig | None = None) -> dict[str, Tensor]:
    """All weights of a base in the original layout; see `make_vae`, `make_encoders`."""
    unet = randomise(UNet(config or SHAPES[name]), 0)
    tensors = {f"model.diffusion_model.{k}": v for k, v in unet.state_dict().items()}
    vae = rename_vae(make_vae().state_dict())
    tensors |= {f"first_stage_model.{k}": v for k, v in vae.items()}
    for encoder, (_, prefix) in zip(make_encoders(name, words), ENCODERS[name]):
        weights = encoder.state_dict()
        if prefix.endswith("model."):
            weights = rename_open_clip(weights)
        else:
            weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        tensors |= {prefix + k: v for k, v in weights.items()}
    return tensors


def write_checkpoint(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata or None)
    return path
