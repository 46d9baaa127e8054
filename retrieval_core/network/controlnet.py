"""The retrieval network: encoder, retrieval sites, optional decoder weights, and its file.

File format (DESIGN, "File format"): one safetensors file, keys `encoder.*`, `retrieval.<site>.*`
and optionally `decoder.*` in the base model's own names; metadata `format`, `format_version`,
`base`, `config`, `recommended`, `training`, and `query_pooling` where queries are pooled. The
decoder is the trained decoder minus that of the base that it was trained on; in version 3 as
low-rank products (`decoder_factors`), in version 1 it was the trained decoder itself.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import RetrievalError
from ..files import check_format, parse_json, read_safetensors, save_safetensors
from .decoder_factors import expand_decoder, factorise_decoder, measure_error
from .retrieval_site import RetrievalSite, choose_query_pools
from .unet import (
    AttentionFunction,
    UNet,
    UNetConfig,
    UNetEncoder,
    attention,
    check_weights,
    detect_config,
    load_strictly,
)

FORMAT = "retrieval_controlnet"
FORMAT_VERSION = 3
DECODER_PARTS = ("output_blocks.", "out.")
# Factor by base; a paper doll's full-resolution sites have only 16 x 16 positions.
QUERY_POOLING = {"sd15": 2, "sd21": 2, "sdxl": 2, "paperdoll": 1}
BASES = tuple(QUERY_POOLING)
# Edge in pixels that each base was trained at, the default size of its references.
NATIVE_SIZE = {"sd15": 512, "sd21": 768, "sdxl": 1024, "paperdoll": 64}
MOST_POOLING = 8

Guidance = Literal["cond", "both"]
GUIDANCES: tuple[str, ...] = get_args(Guidance)


@dataclass(frozen=True)
class Card:
    """Metadata of a network's file.

    `recommended` holds `strength` (the paper's default for faces is 1.5, §5.2) and `guidance`
    ("cond" or "both": the rows that retrieve); `training` is free-form provenance.
    """

    base: str
    recommended: dict[str, Any] = field(
        default_factory=lambda: {"strength": 1.0, "guidance": "cond"}
    )
    training: dict[str, Any] = field(default_factory=dict)


class RetrievalEncoder(UNetEncoder):
    """A copy of the base U-Net's time embedding, encoder and middle block.

    Its inputs are the clean VAE latent of a reference, timestep 0, and a text context that says
    what to take from the reference ("face", "clothes", "figure", or tags).
    """

    def forward(
        self, latents: Tensor, context: Tensor, y: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Features f_s of every site.

        Args:
            latents: [R, C, H, W], scaled as the base model's latents are. For an inpainting base
                (2 C + 1 input channels) an empty mask and the latents themselves are appended.
            context: [R, L, D] text context of each reference.
            y: [R, A] vector conditioning where the base has one (SDXL).

        Returns:
            site -> [R, C_s, H_s, W_s].
        """
        if self.config.in_channels == 2 * latents.shape[1] + 1:
            latents = torch.cat([latents, torch.zeros_like(latents[:, :1]), latents], 1)
        timesteps = torch.zeros(latents.shape[0], device=latents.device)
        emb = self.embed(timesteps, y, latents.dtype)
        features = self.encode(latents, emb, context)
        return dict(zip(self.config.site_channels(), features, strict=True))


class RetrievalControlNet(nn.Module):
    """Encoder and retrieval sites for a base U-Net of shape `config`.

    Args:
        config: the base U-Net's shape; sites and their widths follow from it.
        operations, attend: injected layers and attention function (see `unet`).
        card: base name, recommended settings and provenance.
        query_pooling: query pooling factor at the full-resolution sites; None: by the base
            (`QUERY_POOLING`).
        kw: device, dtype of the weights.

    Attributes:
        decoder: trained decoder weights under the base model's own names (`output_blocks.*`,
            `out.*`), or empty (§5.4). Of a difference, weights that are zero may be left out.
        decoder_is_difference: whether `decoder` is the difference to the base that it was trained
            on; in files of version 1 it is the trained weights.
    """

    def __init__(
        self,
        config: UNetConfig,
        card: Card,
        operations: Any = nn,
        attend: AttentionFunction = attention,
        query_pooling: int | None = None,
        **kw: Any,
    ):
        super().__init__()
        self.config, self.card = config, card
        if query_pooling is None:
            query_pooling = QUERY_POOLING[card.base]
        self.query_pooling = query_pooling
        pools = choose_query_pools(config, query_pooling)
        self.encoder = RetrievalEncoder(config, operations, attend, **kw)
        self.retrieval = nn.ModuleDict(
            {
                site: RetrievalSite(
                    channels, config.heads(channels), operations, attend, pools[site], **kw
                )
                for site, channels in config.site_channels().items()
            }
        )
        self.decoder: dict[str, Tensor] = {}
        self.decoder_is_difference = True

    @classmethod
    def from_base(
        cls, base: Mapping[str, Tensor], name: str, seed: int = 0, **kw: Any
    ) -> RetrievalControlNet:
        """An untrained network for a base U-Net, whose encoder it copies (§4.1).

        Args:
            base: the U-Net's weights.
            name: one of `BASES`.
            seed: of the retrieval layers' initial rotation.
            kw: of the class, and `config` (by default from the checkpoint's shapes).

        Raises:
            RetrievalError: the weights are not of a U-Net of this family.
        """
        config = kw.pop("config", None) or detect_config(base)
        network = cls(config, Card(name), **kw)
        copied = {k: v for k, v in base.items() if not k.startswith(DECODER_PARTS)}
        load_strictly(network.encoder, copied, "encoder")
        generator = torch.Generator().manual_seed(seed)
        for site in network.retrieval.values():
            site.initialise(generator)
        return network

    def encode_features(
        self, latents: Tensor, context: Tensor, y: Tensor | None = None
    ) -> dict[str, tuple[Tensor, tuple[int, int]]]:
        """site -> the features f_s [R, 1, H_s * W_s, C_s] of each reference, and (H_s, W_s).

        Args:
            latents: clean reference latents [R, C, H, W].
            context: [R, L, D].
            y: [R, A] where the base has a vector conditioning.
        """
        features = self.encoder(latents, context, y).items()
        return {s: (f.flatten(2).transpose(1, 2)[:, None], tuple(f.shape[2:])) for s, f in features}

    def apply_decoder(self, unet: UNet, strength: float = 1.0) -> UNet:
        """A U-Net with the base's encoder and the trained decoder, or the base if there is none.

        For inference, with torch's own layers and attention. The base is not changed.

        Args:
            strength: scale of the difference, limited to 1.
        """
        if not self.decoder:
            return unet
        own = unet.state_dict()
        decoder = {k: v.to(own[k]) for k, v in self.decoder.items()}
        if self.decoder_is_difference:
            decoder = {k: own[k] + min(strength, 1.0) * v for k, v in decoder.items()}
        with torch.device("meta"):
            patched = UNet(unet.config).requires_grad_(False)
        # As a state dict, detached: assigning the base's parameters would set their requires_grad.
        patched.load_state_dict({**own, **decoder}, assign=True)
        return patched.eval()

    def save(
        self,
        path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        decoder_rank: int | None = None,
    ) -> None:
        """Writes the network's file atomically, weights as `dtype` (default: unchanged).

        Args:
            decoder_rank: of the products that the decoder's difference is stored as; None: whole.
                The provenance then has "decoder_rank" and "decoder_error" (`measure_error`).
        """
        decoder, version = self.decoder, 2 if self.decoder_is_difference else 1
        training = self.card.training
        if decoder and decoder_rank is not None:
            decoder, version = factorise_decoder(decoder, decoder_rank), 3
            error = measure_error(self.decoder, decoder)
            training = {**training, "decoder_rank": decoder_rank, "decoder_error": error}
        tensors = dict(self.state_dict())
        tensors |= {f"decoder.{k}": v for k, v in decoder.items()}
        if dtype is not None:
            tensors = {k: v.to(dtype) for k, v in tensors.items()}
        metadata = {
            "format": FORMAT,
            "format_version": str(version),
            "base": self.card.base,
            "config": json.dumps(asdict(self.config)),
            "recommended": json.dumps(self.card.recommended),
            "training": json.dumps(training),
        }
        if self.query_pooling > 1:
            metadata["query_pooling"] = str(self.query_pooling)
        save_safetensors(path, tensors, metadata)


def load(path: str | os.PathLike[str], base: str | None = None, **kw: Any) -> RetrievalControlNet:
    """Reads a network's file; see `build_network`."""
    return build_network(*read_safetensors(path), path, base, **kw)


def build_network(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: str | os.PathLike[str],
    base: str | None = None,
    load_weights: Callable[[nn.Module, dict[str, Tensor]], object] = nn.Module.load_state_dict,
    **kw: Any,
) -> RetrievalControlNet:
    """Builds the network of a file.

    Args:
        tensors, metadata: of a safetensors file written by `RetrievalControlNet.save`.
        path: of the file, for messages.
        base: the base model in use, one of `BASES`; None accepts any.
        load_weights: called with a module and weights that fit it.
        kw: `operations`, `attend`, `device`, `dtype` of the layers.

    Raises:
        RetrievalError: another format, a newer version, another base, impossible metadata, or
            missing, unexpected or misshapen keys.
    """
    remedy = "choose a retrieval network of models/retrieval_controlnet"
    check_format(path, metadata, FORMAT, remedy, FORMAT_VERSION)
    found = metadata.get("base", "")
    if found not in BASES:
        raise RetrievalError(
            f"'{path}' is for base {found!r} and this pack knows {', '.join(BASES)}; update the "
            "pack or choose another file."
        )
    if base is not None and found != base:
        raise RetrievalError(
            f"'{path}' was trained for base '{found}' and the model given is '{base}'; choose the "
            f"file for '{base}' or load a model of '{found}'."
        )
    shape, recommended, training = (
        parse_json(metadata.get(key), key, path) for key in ("config", "recommended", "training")
    )
    config, pooling = UNetConfig.from_dict(shape), _parse_pooling(path, metadata)
    card = Card(found, _check_recommended(recommended, path), training)
    decoder = {k[len("decoder.") :]: v for k, v in tensors.items() if k.startswith("decoder.")}
    rest = {k: v for k, v in tensors.items() if not k.startswith("decoder.")}
    factored = metadata["format_version"] == "3"
    if factored:
        decoder = expand_decoder(decoder)
    # Compared on the meta device: a host's layers may have no weights before they are loaded.
    with torch.device("meta"):
        check_weights(RetrievalControlNet(config, card).state_dict(), rest, f"network '{path}'")
        if decoder:
            expected = select_decoder(UNet(config))
            if factored:  # without what is zero
                expected = {k: v for k, v in expected.items() if k in decoder}
            check_weights(expected, decoder, f"decoder of '{path}'")
    network = RetrievalControlNet(config, card, query_pooling=pooling, **kw)
    load_weights(network, rest)
    # Copies: safetensors maps the file, which may be overwritten.
    network.decoder = {k: v.clone() for k, v in decoder.items()}
    network.decoder_is_difference = metadata["format_version"] != "1"
    return network


def _parse_pooling(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> int:
    value = metadata.get("query_pooling", "1")
    if not value.isdecimal() or not 1 <= int(value) <= MOST_POOLING:
        raise RetrievalError(
            f"'{path}' has query_pooling {value!r}, where a number from 1 to {MOST_POOLING} "
            "belongs; use a file saved by this pack."
        )
    return int(value)


def _check_recommended(values: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """The file's recommended settings, completed by the defaults."""
    values = {**Card("").recommended, **values}
    strength, guidance = values["strength"], values["guidance"]
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if not number or not math.isfinite(strength) or guidance not in GUIDANCES:
        raise RetrievalError(
            f"'{path}' recommends strength {strength!r} and guidance {guidance!r}, where a number "
            f"and one of {', '.join(GUIDANCES)} belong; use a file saved by this pack."
        )
    return values


def select_decoder(unet: UNet) -> dict[str, Tensor]:
    """The decoder's weights under the base model's own names."""
    return {k: v for k, v in unet.state_dict().items() if k.startswith(DECODER_PARTS)}


def subtract_decoder(
    trained: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The difference of a trained decoder to its base's, both from `select_decoder`."""
    return {k: v.detach() - base[k].detach().to(v) for k, v in trained.items()}
