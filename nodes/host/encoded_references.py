"""The value of REFERENCES, and how references are encoded in the host."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import comfy.model_management as management
import comfy.utils
import torch
from torch import Tensor

from ...retrieval_core.bank.site_bank import Bank, SiteBank, project
from ...retrieval_core.bank.thumbnails import thumbnail
from ...retrieval_core.bank.tokens import EncodedReference, Tokens, check_weight, gather
from ...retrieval_core.data.prepare import PreparedReference, prepare
from ...retrieval_core.errors import RetrievalError
from . import environment as host
from .loaded_network import Network

_REMEMBERED_BYTES = 256 << 20
# Copies of a site's tokens alive at once while a bank is made: as they are, normed, keys, values,
# and both joined with the null token.
_ALIVE = 6


@dataclass(frozen=True, eq=False)
class References:
    """Encoded references on the CPU, and the network that encoded them; immutable."""

    network: Network
    encoded: tuple[EncodedReference, ...] = ()
    _banks: dict[int | None, Bank] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict) -> References:
        return self

    def get_ram_usage(self) -> int:
        """Bytes, for the host's cache."""
        banks = sum(bank.nbytes() for bank in self._banks.values())
        return banks + sum(reference.nbytes() for reference in self.encoded)

    def bank(self, token_budget: int | None = None) -> Bank:
        """The bank of all references, of at most `token_budget` tokens a site, on the CPU.

        The last one is kept for when something else of an application changes.

        Raises:
            RetrievalError: all weights are 0, or the budget is below 1.
        """
        if token_budget not in self._banks:
            bank = _project(self.network, gather(self.encoded), token_budget)
            self._banks.clear()
            self._banks[token_budget] = bank
        return self._banks[token_budget]

    def site_bank(self, site: str, device: torch.device) -> SiteBank:
        """One site of the bank, all tokens of all references; for use while sampling, when the
        site's layers are on the device."""
        tokens = gather([reference.at(site).to(device) for reference in self.encoded])
        return project(tokens, self.network.layers).sites[site]

    def check_network(self, network: Network) -> None:
        """RetrievalError unless `network` has the weights that encoded these references."""
        if self.network.fingerprint != network.fingerprint:
            raise RetrievalError(
                f"The references to add to were encoded by '{self.network.name}' (base "
                f"'{self.network.base}') and this node encodes with '{network.name}' (base "
                f"'{network.base}'); encode all of them with the same network."
            )


def _project(network: Any, tokens: Tokens, token_budget: int | None) -> Bank:
    """`bank.project` on the host's device, or on the CPU where that has no room."""
    device, bar = management.get_torch_device(), comfy.utils.ProgressBar(len(tokens.sites))

    def on_site(done: int, count: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, count)

    trained = network.layers is not None
    moved = [site for site in tokens.sites.values() if trained or site.over(token_budget)]
    needed = _ALIVE * max((site.parts.numel() for site in moved), default=0)
    needed *= torch.float32.itemsize
    if trained:
        management.load_models_gpu([network.sites], memory_required=needed)
    else:
        management.free_memory(needed, device)
    try:
        return project(tokens, network.layers, token_budget, device, on_site)
    except management.OOM_EXCEPTION:
        return project(tokens, network.layers, token_budget, "cpu", on_site)


class _Memory:
    """The last encoded references, so that only what changed is encoded again."""

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self.kept: OrderedDict[tuple, EncodedReference] = OrderedDict()

    def get(self, key: tuple) -> EncodedReference | None:
        if key in self.kept:
            self.kept.move_to_end(key)
        return self.kept.get(key)

    def put(self, key: tuple, reference: EncodedReference) -> None:
        if key in self.kept or reference.nbytes() > self.limit:
            return
        self.kept[key] = reference
        self.used += reference.nbytes()
        while self.used > self.limit:
            self.used -= self.kept.popitem(last=False)[1].nbytes()

    def clear(self) -> None:
        self.kept.clear()
        self.used = 0


memory = _Memory(_REMEMBERED_BYTES)


def encode_references(
    network: Network,
    images: Tensor,
    vae: Any,
    clip: Any,
    concept: str,
    weight: float = 1.0,
    masks: Tensor | None = None,
    size: int = 0,
) -> tuple[EncodedReference, ...]:
    """Encodes a batch of images, one reference each, on the host's device.

    Args:
        images: [R, H, W, 3] in 0..1. masks: [H, W] or [M, H, W] of any size, repeated over the
            batch as the host does, or None.
        concept: the text that says what to take. weight: of every reference of the batch.
        size: edge in pixels that references are scaled to; 0 for the base model's own.

    Raises:
        RetrievalError: no images, a mask that selects nothing, or a VAE or CLIP of another base.
    """
    weight = check_weight(weight)
    size = size or host.NATIVE_SIZE[network.base]
    prepared = _prepare(images, masks, concept, size)
    if vae is None or clip is None:
        made_by: tuple = ()
    else:
        made_by = (host.identity(vae.patcher), host.identity(clip.patcher), clip.layer_idx)
    shared = (network.fingerprint, network.identity, made_by, concept, size)
    keys = [(*shared, _digest(reference)) for reference in prepared]
    results = {key: memory.get(key) for key in keys}
    missing = [i for i, key in enumerate(keys) if results[key] is None and keys.index(key) == i]
    if missing:
        chosen = [prepared[i] for i in missing]
        with torch.inference_mode():
            context, pooled, latents = _read(network, chosen, vae, clip, concept)
            trained = isinstance(network, Network)
            encode = partial(_encode, network) if trained else network.encode
            encoded = encode(chosen, context, pooled, latents, concept, size)
        for i, reference in zip(missing, encoded, strict=True):
            reference = replace(reference, thumbnail=thumbnail(prepared[i].image))
            results[keys[i]] = reference
            memory.put(keys[i], reference)
    found = (results[key] for key in keys)
    return tuple(replace(reference, weight=weight) for reference in found if reference is not None)


def _prepare(
    images: Tensor, masks: Tensor | None, concept: str, size: int
) -> list[PreparedReference]:
    if images.ndim != 4 or not images.numel():
        raise RetrievalError(
            f"The batch of reference images is empty (shape {list(images.shape)}); connect at "
            "least one image."
        )
    fitted: Sequence[Tensor | None] = [None] * len(images)
    if masks is not None:
        masks = masks[None] if masks.ndim == 2 else masks.reshape(-1, *masks.shape[-2:])
        if not masks.numel():
            raise RetrievalError(
                f"The batch of masks is empty (shape {list(masks.shape)}); connect a mask, or none."
            )
        fitted = list(comfy.utils.repeat_to_batch_size(masks, len(images)))
    pairs = zip(images, fitted, strict=True)
    return [prepare(i[..., :3].float(), m, concept, size=size) for i, m in pairs]


def _read(
    network: Network, prepared: Sequence[PreparedReference], vae: Any, clip: Any, concept: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Context [1, L, D] and pooled output of the concept, clean latents [R, C, h, w]."""
    width, channels = network.network.config.context_dim, network.latent_channels
    context, pooled = host.encode_text(clip, concept)
    if context.shape[-1] != width:
        raise RetrievalError(
            f"The CLIP given makes text of width {context.shape[-1]} and '{network.name}' "
            f"(base '{network.base}') reads {width}; connect the CLIP of the base model."
        )
    pixels = torch.stack([reference.image.movedim(0, -1) for reference in prepared])
    latents = host.encode_pixels(vae, pixels, network.latent_format)
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise RetrievalError(
            f"The VAE given makes latents of {latents.shape[1]} channels and '{network.name}' "
            f"(base '{network.base}') reads {channels}; connect the VAE of the base model."
        )
    return context, pooled, latents


def _encode(
    network: Network,
    prepared: Sequence[PreparedReference],
    context: Tensor,
    pooled: Tensor | None,
    latents: Tensor,
    concept: str,
    size: int,
) -> list[EncodedReference]:
    config = network.network.config
    vector = None
    if config.adm_in_channels is not None:
        vector = host.vector_conditioning(pooled, size, config.adm_in_channels)
    kind = network.compute_dtype
    needed = latents[0, 0].numel() * management.dtype_size(kind) * 0.01 * (1 << 20)
    management.load_models_gpu([network.encoder, network.sites], memory_required=needed)
    device = network.encoder.load_device
    inputs = [None if t is None else t.to(device, kind) for t in (context, vector)]
    progress = comfy.utils.ProgressBar(len(prepared))
    encoded = []
    for latent, reference in zip(latents, prepared, strict=True):
        management.throw_exception_if_processing_interrupted()
        (one,) = network.network.encode(
            latent[None].to(device, kind), *inputs, masks=[reference.mask], concepts=[concept]
        )
        encoded.append(one.to("cpu"))
        progress.update(1)
    return encoded


def _digest(reference: PreparedReference) -> str:
    digest = hashlib.sha256(reference.image.numpy().tobytes())
    if reference.mask is not None:
        digest.update(reference.mask.contiguous().numpy().tobytes())
    return digest.hexdigest()
