"""The value of RETRIEVAL_CONTROLNET: a network in the host's care."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from ...retrieval_core.bank.bank_file import Maker, fingerprint_of
from ...retrieval_core.files import read_metadata, read_safetensors
from ...retrieval_core.network.controlnet import RetrievalControlNet, load
from . import environment as host

_STORED = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, eq=False)
class Network:
    """A retrieval network that the host loads and unloads; immutable.

    Attributes:
        name: the file's, for messages.
        network: the core's module; its two halves are moved by `encoder` and `sites` alone.
        encoder, sites: ModelPatchers of the retrieval encoder and of the sites' layers. Sampling
            needs the sites only, so the larger half can leave the GPU.
        latent_format: of the base model, which scales its VAE's latents.
        compute_dtype: what the encoder computes in and encoded references are kept in.
        fingerprint: of the encoder and the sites; references of equal ones fit together.
    """

    name: str
    network: RetrievalControlNet
    encoder: Any
    sites: Any
    latent_format: Any
    compute_dtype: torch.dtype
    fingerprint: str

    @property
    def base(self) -> str:
        return self.network.card.base

    @property
    def layers(self) -> Any:
        """The sites' layers, which make banks of references."""
        return self.network.retrieval

    @property
    def maker(self) -> Maker:
        """What saved references are bound to."""
        return Maker(self.base, self.fingerprint, self.network.config.site_channels())

    @property
    def identity(self) -> None:
        """What encoded references depend on beside the fingerprint: nothing."""
        return None

    @property
    def latent_channels(self) -> int:
        """Of the references' latents."""
        return self.network.config.in_channels

    def __deepcopy__(self, memo: dict) -> Network:
        return self

    def get_ram_usage(self) -> int:
        """Bytes, for the host's cache."""
        decoder = sum(v.numel() * v.element_size() for v in self.network.decoder.values())
        return self.encoder.model_size() + self.sites.model_size() + decoder


# A LoRA's strength that changed runs the loader again. The networks read last for a base model are
# kept for as long as it is, so that nothing is read, and no reference encoded, a second time.
_KEPT = 2
_kept: weakref.WeakKeyDictionary[Any, dict[tuple, Network]] = weakref.WeakKeyDictionary()


def load_network(path: str | os.PathLike[str], model: Any) -> Network:
    """Reads a network's file for a MODEL, or finds it where it was read before.

    Raises:
        RetrievalError: the file is missing, damaged, of another format, version or base.
    """
    base = host.detect_base(model)
    read_metadata(path)  # refuses what is not a whole file
    status = os.stat(path)
    key = (os.path.abspath(path), status.st_mtime_ns, status.st_size)
    kept = _kept.setdefault(model.model, {})
    found = kept.pop(key, None)
    if found is None:
        stored, parameters = _stored(path)
        weights, compute = host.choose_types(base.name, stored, parameters)
        network = load(
            path,
            base.name,
            operations=host.OPERATIONS,
            attend=host.attention_for(base.name),
            device=host.offload_device(),
            dtype=weights,
        )
        name = os.path.basename(path)
        host.check_fit(base, network.config, network.card.base, name)
        found = in_hosts_care(name, network, base.latent_format, compute, _fingerprint(path))
    kept[key] = found
    while len(kept) > _KEPT:
        kept.pop(next(iter(kept)))
    return found


def in_hosts_care(
    name: str,
    network: RetrievalControlNet,
    latent_format: Any,
    compute: torch.dtype,
    fingerprint: str | None = None,
) -> Network:
    """Wraps a network made with the host's layers (`host.OPERATIONS`).

    Args:
        fingerprint: of its file, if it has one: the weights' own depends on the type that this
            machine keeps them in, and saved references are for others too.
    """
    network.eval().requires_grad_(False)
    return Network(
        name,
        network,
        host.patcher(network.encoder),
        host.patcher(network.retrieval),
        latent_format,
        compute,
        fingerprint or fingerprint_of(network.state_dict()),
    )


def _fingerprint(path: str | os.PathLike[str]) -> str:
    """Of the weights that references are encoded with, as the file has them."""
    tensors, _ = read_safetensors(path)
    return fingerprint_of({k: v for k, v in tensors.items() if not k.startswith("decoder.")})


def _stored(path: str | os.PathLike[str]) -> tuple[torch.dtype | None, int]:
    """The type that most of a file's values are stored in, and how many it holds."""
    counts: dict[str, int] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():
            part = file.get_slice(key)
            size = 1
            for edge in part.get_shape():
                size *= edge
            counts[part.get_dtype()] = counts.get(part.get_dtype(), 0) + size
    most = max(counts, key=counts.__getitem__, default="")
    return _STORED.get(most), sum(counts.values())
