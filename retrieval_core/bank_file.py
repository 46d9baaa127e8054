"""Saving and loading encoded references, bound to the network that made them by a fingerprint.

File format: one safetensors file, keys `<i>.keys.<site>` and `<i>.values.<site>`, each [N, D], and
optionally `<i>.thumbnail`, uint8 [h, w, 3], of each reference i; metadata `format`,
`format_version`, `base`, `fingerprint`, `references` (JSON list of weight and concept), and
`ssmd_cover_images` (JSON list of base64 images), the field in which model files carry their
pictures and ComfyUI looks for them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .bank import EncodedReference, check_weight
from .controlnet import RetrievalControlNet
from .errors import RetrievalError
from .files import read_safetensors, save_safetensors
from .thumbnails import as_base64_jpeg, sheet

if TYPE_CHECKING:
    from .training_free import TrainingFree

FORMAT = "retrieval_references"
FORMAT_VERSION = 1
COVER = "ssmd_cover_images"
_SAMPLED = 256


@dataclass(frozen=True)
class Maker:
    """What encoded references depend on.

    Attributes:
        base: the base model's name. fingerprint: of the network that encoded them.
        sites: site -> width of its keys and values.
    """

    base: str
    fingerprint: str
    sites: Mapping[str, int]

    @classmethod
    def of(cls, network: RetrievalControlNet | TrainingFree) -> Maker:
        """A trained network, or the training-free mode, as a maker of references."""
        if isinstance(network, RetrievalControlNet):
            return cls(network.card.base, fingerprint(network), network.config.site_channels())
        return cls(network.card.base, network.fingerprint, network.site_channels())


def fingerprint(network: nn.Module) -> str:
    """Tells networks apart; see `fingerprint_of`."""
    return fingerprint_of(network.state_dict())


def fingerprint_of(weights: Mapping[str, Tensor]) -> str:
    """A hash over names, shapes and evenly spread values of all weights.

    The values are compared as float32, so that a file loaded as float16 and as float32 agree as
    long as its own type is no finer than float16.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        flat = tensor.detach().flatten()
        stride = max(1, flat.numel() // _SAMPLED)
        values = flat[::stride][:_SAMPLED].to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def save_references(
    path: str | os.PathLike[str],
    references: Sequence[EncodedReference],
    network: RetrievalControlNet | TrainingFree | Maker,
) -> None:
    """Writes encoded references atomically as one safetensors file.

    Raises:
        RetrievalError: there is nothing to save, or the file cannot be written.
    """
    if not references:
        raise RetrievalError("There are no references to save; encode at least one.")
    maker = network if isinstance(network, Maker) else Maker.of(network)
    tensors: dict[str, Tensor] = {}
    for index, reference in enumerate(references):
        tensors |= {f"{index}.keys.{site}": k for site, k in reference.keys.items()}
        tensors |= {f"{index}.values.{site}": v for site, v in reference.values.items()}
        if reference.thumbnail is not None:
            tensors[f"{index}.thumbnail"] = reference.thumbnail
    about = [{"weight": r.weight, "concept": r.concept} for r in references]
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "base": maker.base,
        "fingerprint": maker.fingerprint,
        "references": json.dumps(about),
    }
    cover = sheet([r.thumbnail for r in references if r.thumbnail is not None])
    if cover is not None:
        metadata[COVER] = json.dumps([as_base64_jpeg(cover)])
    save_safetensors(path, tensors, metadata)


def load_references(
    path: str | os.PathLike[str], network: RetrievalControlNet | TrainingFree | Maker
) -> list[EncodedReference]:
    """Reads references that `network` encoded, bit for bit as they were saved.

    Raises:
        RetrievalError: no such file, truncated, another format, a newer version, made by another
            network, or keys that do not fit the network.
    """
    maker = network if isinstance(network, Maker) else Maker.of(network)
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
    if metadata.get("fingerprint") != maker.fingerprint:
        raise RetrievalError(
            f"'{path}' was encoded by another network (for base '{metadata.get('base')}') than the "
            f"one loaded (for base '{maker.base}'); encode the references again with this one."
        )
    try:
        about = json.loads(metadata.get("references", ""))
        entries = [(check_weight(entry["weight"]), str(entry["concept"])) for entry in about]
    except (ValueError, TypeError, KeyError) as error:
        raise RetrievalError(
            f"The list of references in '{path}' cannot be read ({error}); save them again."
        ) from error
    expected = {
        f"{i}.{kind}.{site}": width
        for i in range(len(entries))
        for kind in ("keys", "values")
        for site, width in maker.sites.items()
    }
    pictures = {f"{i}.thumbnail" for i in range(len(entries))} & tensors.keys()
    wrong = sorted(expected.keys() ^ (tensors.keys() - pictures))
    wrong = wrong or [key for key, width in expected.items() if tensors[key].shape[1:] != (width,)]
    wrong = wrong or _uneven(tensors, len(entries), maker.sites)
    wrong = wrong or sorted(key for key in pictures if not _is_picture(tensors[key]))
    if wrong or not entries:
        raise RetrievalError(
            f"'{path}' does not hold what its list of {len(entries)} references says (first wrong "
            f"key: {wrong[0] if wrong else 'none at all'}); save the references again."
        )
    # Copies: what safetensors hands out is a view of the file, which may be overwritten.
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    return [
        EncodedReference(
            {site: tensors[f"{i}.keys.{site}"] for site in maker.sites},
            {site: tensors[f"{i}.values.{site}"] for site in maker.sites},
            weight,
            concept,
            tensors.get(f"{i}.thumbnail"),
        )
        for i, (weight, concept) in enumerate(entries)
    ]


def _uneven(tensors: Mapping[str, Tensor], count: int, sites: Mapping[str, int]) -> list[str]:
    """Keys whose values are not as many, or are not floating-point numbers."""
    pairs = [(f"{i}.keys.{site}", f"{i}.values.{site}") for i in range(count) for site in sites]
    return [
        keys
        for keys, values in pairs
        if len(tensors[keys]) != len(tensors[values])
        or not (tensors[keys].is_floating_point() and tensors[values].is_floating_point())
    ]


def _is_picture(tensor: Tensor) -> bool:
    return tensor.dtype == torch.uint8 and tensor.ndim == 3 and tensor.shape[2] == 3
