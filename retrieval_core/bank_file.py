"""Saving and loading encoded references, bound to the network that made them by a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .bank import EncodedReference, check_weight
from .controlnet import RetrievalControlNet
from .errors import RetrievalError
from .files import read_safetensors, save_safetensors

FORMAT = "retrieval_references"
FORMAT_VERSION = 1
_SAMPLED = 256


def fingerprint(network: nn.Module) -> str:
    """Tells networks apart: a hash over names, shapes and evenly spread values of all weights.

    The values are compared as float32, so that a file loaded as float16 and as float32 agree as
    long as its own type is no finer than float16.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        flat = tensor.detach().flatten()
        stride = max(1, flat.numel() // _SAMPLED)
        values = flat[::stride][:_SAMPLED].to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def save_references(
    path: str | os.PathLike[str],
    references: Sequence[EncodedReference],
    network: RetrievalControlNet,
) -> None:
    """Writes encoded references atomically as one safetensors file.

    Keys are `<index>.keys.<site>` and `<index>.values.<site>`, each [N, D].

    Raises:
        RetrievalError: there is nothing to save, or the file cannot be written.
    """
    if not references:
        raise RetrievalError("There are no references to save; encode at least one.")
    tensors: dict[str, Tensor] = {}
    for index, reference in enumerate(references):
        tensors |= {f"{index}.keys.{site}": k for site, k in reference.keys.items()}
        tensors |= {f"{index}.values.{site}": v for site, v in reference.values.items()}
    about = [{"weight": r.weight, "concept": r.concept} for r in references]
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "base": network.card.base,
        "fingerprint": fingerprint(network),
        "references": json.dumps(about),
    }
    save_safetensors(path, tensors, metadata)


def load_references(
    path: str | os.PathLike[str], network: RetrievalControlNet
) -> list[EncodedReference]:
    """Reads references that `network` encoded, bit for bit as they were saved.

    Raises:
        RetrievalError: no such file, truncated, another format, a newer version, made by another
            network, or keys that do not fit the network.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise RetrievalError(
            f"'{path}' has format {metadata.get('format')!r}, not {FORMAT!r}; choose a file of "
            "saved references."
        )
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) > FORMAT_VERSION:
        raise RetrievalError(
            f"'{path}' has format version {version or 'none'} and this pack reads up to "
            f"{FORMAT_VERSION}; update the pack."
        )
    if metadata.get("fingerprint") != fingerprint(network):
        raise RetrievalError(
            f"'{path}' was encoded by another network (for base '{metadata.get('base')}') than the "
            f"one loaded (for base '{network.card.base}'); encode the references again with this "
            "one."
        )
    try:
        about = json.loads(metadata.get("references", ""))
        entries = [(check_weight(entry["weight"]), str(entry["concept"])) for entry in about]
    except (ValueError, TypeError, KeyError) as error:
        raise RetrievalError(
            f"The list of references in '{path}' cannot be read ({error}); save them again."
        ) from error
    widths = network.config.site_channels()
    expected = {
        f"{i}.{kind}.{site}": width
        for i in range(len(entries))
        for kind in ("keys", "values")
        for site, width in widths.items()
    }
    wrong = sorted(expected.keys() ^ tensors.keys()) or [
        key for key, width in expected.items() if tensors[key].shape[1:] != (width,)
    ]
    if wrong or not entries:
        raise RetrievalError(
            f"'{path}' does not hold what its list of {len(entries)} references says (first wrong "
            f"key: {wrong[0] if wrong else 'none at all'}); save the references again."
        )
    return [
        EncodedReference(
            {site: tensors[f"{i}.keys.{site}"] for site in widths},
            {site: tensors[f"{i}.values.{site}"] for site in widths},
            weight,
            concept,
        )
        for i, (weight, concept) in enumerate(entries)
    ]
