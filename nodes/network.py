"""The value of RETRIEVAL_CONTROLNET: a network in the host's care."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..retrieval_core.controlnet import RetrievalControlNet, load
from ..retrieval_core.files import read_metadata
from . import host

_STORED = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_SAMPLES = 1024


@dataclass(frozen=True, eq=False)
class Network:
    """A retrieval network that the host loads and unloads; immutable.

    Attributes:
        name: the file's, for messages.
        network: the core's module; its two halves are moved by `encoder` and `sites` alone.
        encoder, sites: ModelPatchers of the retrieval encoder and of the sites' layers. Sampling
            needs the sites only, so the larger half can leave the GPU.
        null_keys: site -> [C], on the CPU.
        latent_format: of the base model, which scales its VAE's latents.
        compute_dtype: what the encoder computes in and encoded references are kept in.
        fingerprint: of the weights; references of equal fingerprints fit together.
    """

    name: str
    network: RetrievalControlNet
    encoder: Any
    sites: Any
    null_keys: Mapping[str, Tensor]
    latent_format: Any
    compute_dtype: torch.dtype
    fingerprint: str

    @property
    def base(self) -> str:
        return self.network.card.base

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
    metadata = read_metadata(path)
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
        found = in_hosts_care(name, network, base.latent_format, compute, metadata)
    kept[key] = found
    while len(kept) > _KEPT:
        kept.pop(next(iter(kept)))
    return found


def in_hosts_care(
    name: str,
    network: RetrievalControlNet,
    latent_format: Any,
    compute: torch.dtype,
    metadata: Mapping[str, str] | None = None,
) -> Network:
    """Wraps a network made with the host's layers (`host.OPERATIONS`)."""
    network.eval().requires_grad_(False)
    nulls = {n: s.null_key.weight[0].to("cpu", compute) for n, s in network.retrieval.items()}
    print_of = fingerprint(network, metadata or network.metadata())
    return Network(
        name,
        network,
        host.patcher(network.encoder),
        host.patcher(network.retrieval),
        nulls,
        latent_format,
        compute,
        print_of,
    )


def fingerprint(network: RetrievalControlNet, metadata: Mapping[str, str]) -> str:
    """A digest of the metadata and of evenly spread samples of every tensor."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    decoder = {f"decoder.{k}": v for k, v in network.decoder.items()}
    for key, tensor in sorted({**network.state_dict(), **decoder}.items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].float().cpu().contiguous()
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


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
