"""Saving and loading encoded references, bound to the network that made them by a fingerprint.

File format: one safetensors file, of each reference i keys `<i>.<part>.<site>`, [N, D], and
optionally `<i>.thumbnail`, uint8 [h, w, 3]. The parts are `features`, or `keys` and `values` in the
training-free mode. Metadata: `format`, `format_version` (1 kept keys and values in both modes),
`base`, `fingerprint`, `references` (JSON list of weight and concept), and `ssmd_cover_images` (JSON
list of base64 images), the field in which model files carry their pictures and ComfyUI looks for
them.
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

from ..errors import RetrievalError
from ..files import read_safetensors, save_safetensors
from ..network.controlnet import RetrievalControlNet
from .thumbnails import as_base64_jpeg, sheet
from .tokens import EncodedReference, check_weight

if TYPE_CHECKING:
    from ..training_free import TrainingFree

FORMAT = "retrieval_references"
FORMAT_VERSION = 2
COVER = "ssmd_cover_images"
FEATURES, KEYS_AND_VALUES = ("features",), ("keys", "values")
_SAMPLED = 256


@dataclass(frozen=True)
class Maker:
    """What encoded references depend on.

    Attributes:
        base: the base model's name. fingerprint: of the network that encoded them.
        sites: site -> width of its tokens.
        parts: what is kept of a token, in the order of `EncodedReference.tokens`.
    """

    base: str
    fingerprint: str
    sites: Mapping[str, int]
    parts: Sequence[str] = FEATURES

    @classmethod
    def of(cls, network: RetrievalControlNet | TrainingFree) -> Maker:
        """A trained network, or the training-free mode, as a maker of references."""
        if isinstance(network, RetrievalControlNet):
            return cls(network.card.base, fingerprint(network), network.config.site_channels())
        channels = network.site_channels()
        return cls(network.card.base, network.fingerprint, channels, KEYS_AND_VALUES)


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
        for site, tokens in reference.tokens.items():
            for part, held in zip(maker.parts, tokens, strict=True):
                tensors[f"{index}.{part}.{site}"] = held
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
    if int(version) == 1 and maker.parts == FEATURES:
        raise RetrievalError(
            f"'{path}' has format version 1, which kept keys and values where this pack keeps the "
            "features that they are made of; encode the references again and save them anew."
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
    keys = [
        {site: [f"{i}.{part}.{site}" for part in maker.parts] for site in maker.sites}
        for i in range(len(entries))
    ]
    expected = {
        key: maker.sites[site]
        for of_reference in keys
        for site, parts in of_reference.items()
        for key in parts
    }
    pictures = {f"{i}.thumbnail" for i in range(len(entries))} & tensors.keys()
    wrong = sorted(expected.keys() ^ (tensors.keys() - pictures))
    wrong = wrong or [key for key, width in expected.items() if tensors[key].shape[1:] != (width,)]
    wrong = wrong or _uneven(tensors, keys)
    wrong = wrong or sorted(key for key in pictures if not _is_picture(tensors[key]))
    if wrong or not entries:
        raise RetrievalError(
            f"'{path}' does not hold what its list of {len(entries)} references says (first wrong "
            f"key: {wrong[0] if wrong else 'none at all'}); save the references again."
        )
    # Copies: what safetensors hands out is a view of the file, which may be overwritten.
    read = [
        {site: torch.stack([tensors[key] for key in parts]) for site, parts in of_reference.items()}
        for of_reference in keys
    ]
    thumbnails = {key: tensors[key].clone() for key in pictures}
    return [
        EncodedReference(tokens, weight, concept, thumbnails.get(f"{i}.thumbnail"))
        for i, (tokens, (weight, concept)) in enumerate(zip(read, entries, strict=True))
    ]


def _uneven(
    tensors: Mapping[str, Tensor], keys: Sequence[Mapping[str, Sequence[str]]]
) -> list[str]:
    """Keys whose parts are not as many, of one type, or are not floating-point numbers."""
    return [
        parts[0]
        for of_reference in keys
        for parts in of_reference.values()
        if len({(len(tensors[key]), tensors[key].dtype) for key in parts}) != 1
        or not tensors[parts[0]].is_floating_point()
    ]


def _is_picture(tensor: Tensor) -> bool:
    return tensor.dtype == torch.uint8 and tensor.ndim == 3 and tensor.shape[2] == 3
