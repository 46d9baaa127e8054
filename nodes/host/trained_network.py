"""A trained network in the host's model management: loading, encoding, making banks, applying."""

from __future__ import annotations

import logging
import os
import weakref
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import comfy.model_management as management
import comfy.utils
import torch
from torch import Tensor

from ...retrieval_core.bank.bank_file import Maker
from ...retrieval_core.bank.encoding import Features
from ...retrieval_core.bank.site_bank import Bank, make_network_bank
from ...retrieval_core.bank.token_budget import Budget
from ...retrieval_core.bank.tokens import Tokens
from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.files import read_safetensors
from ...retrieval_core.network.controlnet import RetrievalControlNet, build_network
from ...retrieval_core.network.fingerprint import fingerprint_weights
from ...retrieval_core.sampling.applications import Retrieval
from ...retrieval_core.sampling.attention_map import choose_map_site
from ...retrieval_core.sampling.controls import Controls, group_sites
from ...retrieval_core.sampling.frozen_site import FrozenSite, freeze_sites
from ...retrieval_core.sampling.presets import Preset
from .attention import choose_attention
from .base_model import check_fit, detect_base
from .conditioning import make_vector_conditioning
from .folders import describe_version
from .loading import (
    OPERATIONS,
    choose_types,
    load_weights,
    make_bank_on_device,
    read_weights,
    wrap_module,
)
from .reference_network import ReferenceNetwork
from .skip_patch import RetrievalPatch, attach_patch

_DECODER = "retrieval_decoder"
# Copies of a site's tokens alive at once while a bank is made: themselves, normed, keys, values,
# and both joined with the null token.
_ALIVE = 6


@dataclass(eq=False)
class TrainedNetwork(ReferenceNetwork):
    """A trained network's file, whose two halves the host loads and unloads.

    Caches the sites' query sides on the CPU (46 MB for SD 1.5), from the first application on for
    as long as it lives.

    Attributes:
        encoder, sites: ModelPatchers of the retrieval encoder and of the sites' layers.
        compute_dtype: the type of the encoder's computation and of encoded references.
    """

    encoder: Any
    sites: Any
    compute_dtype: torch.dtype

    def get_ram_usage(self) -> int:
        """Bytes, for the host's cache."""
        decoder = sum(t.numel() * t.element_size() for t in self.network.decoder.values())
        return self.encoder.model_size() + self.sites.model_size() + decoder

    def encode(self, latent: Tensor, context: Tensor, pooled: Tensor | None, size: int) -> Features:
        vector = None
        if self.config.adm_in_channels is not None:
            vector = make_vector_conditioning(pooled, size, self.config.adm_in_channels)
        kind = self.compute_dtype
        needed = latent[0, 0].numel() * management.dtype_size(kind) * 0.01 * (1 << 20)
        management.load_models_gpu([self.encoder], memory_required=needed)
        device = self.encoder.load_device
        inputs = [None if t is None else t.to(device, kind) for t in (latent, context, vector)]
        return self.network.encode_features(*inputs)

    def make_bank(self, tokens: Tokens, budget: Budget) -> Bank:
        needed = _ALIVE * torch.float32.itemsize * tokens.count_largest()
        management.load_models_gpu([self.sites], memory_required=needed)
        return make_bank_on_device(partial(make_network_bank, self.network, tokens, budget))

    @cached_property
    def _frozen(self) -> dict[str, FrozenSite]:
        """site -> its query side, on the CPU."""
        return freeze_sites(self.network, lambda layer: read_weights(layer, self.compute_dtype))

    def apply(
        self,
        model: Any,
        references: Any,
        controls: Controls,
        scale: float,
        preset: Preset,
        **acting: Any,
    ) -> Any:
        names = ("strength", "start", "end")
        acting["strength"], acting["end"] = preset.limit(*(acting[name] for name in names))
        retrieval = Retrieval(
            references.bank(controls.token_budget),
            sites=self._frozen,
            site_strength=controls.site_strengths(group_sites(self.config)),
            **acting,
        )
        seen = references.site_bank(choose_map_site(self.config), controls.token_budget)
        patched = model.clone()
        attach_patch(patched, RetrievalPatch(self.config, retrieval, references.described(), seen))
        self._apply_decoder(patched, scale * preset.strength)
        return patched

    def _apply_decoder(self, patched: Any, scale: float) -> None:
        """Adds the trained decoder's difference as host weight patches, scaled by at most 1.

        Where the network is applied to a model more than once, the largest scale counts.
        """
        weights, scale = self.network.decoder, min(scale, 1.0)
        if not weights:
            return
        fingerprint = fingerprint_weights(weights)
        applied: _AppliedDecoder | None = patched.get_attachment(_DECODER)
        if applied is not None:
            if applied.fingerprint != fingerprint:
                raise RetrievalError(
                    "The model already has the trained decoder of another network than "
                    f"'{self.name}'; apply references of one network with a decoder to a model."
                )
            if applied.scale >= scale:
                return
            for key, patch in applied.patches.items():
                patched.patches[key] = [e for e in patched.patches[key] if e[1] is not patch]
        kind = "diff" if self.network.decoder_is_difference else "set"
        patches = {f"diffusion_model.{key}": (kind, (value,)) for key, value in weights.items()}
        taken = patched.add_patches(patches, scale)
        if len(taken) != len(patches):
            missing = sorted(set(patches) - set(taken))
            raise RetrievalError(
                f"The trained decoder of '{self.name}' has {len(missing)} weights that the model "
                f"lacks (first: {missing[0]}); load a model with the decoder of '{self.base}'."
            )
        if kind == "set":
            for key in taken:  # before earlier LoRAs, which "set" would undo
                entries = patched.patches[key]
                entries.insert(0, entries.pop())
            logging.warning(
                f"'{self.name}' has format version 1: its decoder replaces the model's own while "
                "references are applied, which undoes what a fine-tuned checkpoint changed there; "
                "use a version 2 of the file, which adds the difference instead."
            )
        patched.set_attachments(_DECODER, _AppliedDecoder(fingerprint, scale, patches))


class _AppliedDecoder(NamedTuple):
    """A decoder on a MODEL: which one, its scale, and the host's patches by key."""

    fingerprint: str
    scale: float
    patches: dict[str, tuple]


# The networks loaded last for each base model, for as long as it lives: changing a LoRA's strength
# reruns the loader node, which must neither read the file nor encode references again.
_CACHED = 2
_networks: weakref.WeakKeyDictionary[Any, dict[tuple, TrainedNetwork]] = weakref.WeakKeyDictionary()


def load_network(path: str | os.PathLike[str], model: Any) -> TrainedNetwork:
    """Loads a network's file for a MODEL, or returns the cached network of the same file.

    Raises:
        RetrievalError: the file is missing, damaged, of another format, version or base.
    """
    base = detect_base(model)
    key = (os.path.abspath(path), describe_version(path))
    cached = _networks.setdefault(model.model, {})
    found = cached.pop(key, None)
    if found is None:
        tensors, metadata = read_safetensors(path)
        stored, count = comfy.utils.weight_dtype(tensors), comfy.utils.calculate_parameters(tensors)
        weights, compute = choose_types(base.name, stored, count)
        network = build_network(
            tensors,
            metadata,
            path,
            base.name,
            load_weights,
            operations=OPERATIONS,
            attend=choose_attention(base.name),
            device=management.unet_offload_device(),
            dtype=weights,
        )
        name = os.path.basename(path)
        check_fit(base, network.config, network.card.base, name)
        encoding = {k: v for k, v in tensors.items() if not k.startswith("decoder.")}
        # Of the file: saved references are for other machines too, which may convert the weights to
        # other types.
        fingerprint = fingerprint_weights(encoding)
        found = manage_network(name, network, base.latent_format, compute, fingerprint)
    cached[key] = found
    while len(cached) > _CACHED:
        cached.pop(next(iter(cached)))
    return found


def manage_network(
    name: str,
    network: RetrievalControlNet,
    latent_format: Any,
    compute_dtype: torch.dtype,
    fingerprint: str,
) -> TrainedNetwork:
    """Hands a network of the host's layers (`loading.OPERATIONS`) to the host's management."""
    network.eval().requires_grad_(False)
    maker = Maker(network.card.base, fingerprint, network.config.site_channels())
    encoder, sites = wrap_module(network.encoder), wrap_module(network.retrieval)
    return TrainedNetwork(name, network, maker, latent_format, encoder, sites, compute_dtype)
