"""Saving and loading encoded references, bound to the network that made them by a fingerprint.

File format: one safetensors file, of each reference i keys `<i>.<kind>.<site>`, [N, D], and
optionally `<i>.thumbnail`, uint8 [h, w, 3]. The kinds are `features`, or `keys` and `values` in the
training-free mode. Metadata: `format`, `format_version` (1 kept keys and values in both modes),
`base`, `fingerprint`, `references` (JSON list of weight, concept and latent_size), and
`ssmd_cover_images` (JSON list of base64 images), the field in which model files carry their
pictures and ComfyUI looks for them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RetrievalError
from ..files import read_safetensors, save_safetensors
from ..network.controlnet import RetrievalControlNet
from ..network.fingerprint import fingerprint_weights
from .thumbnails import draw_thumbnails, encode_base64_jpeg
from .tokens import EncodedReference, check_weight

FORMAT = "retrieval_references"
FORMAT_VERSION = 2
COVER = "ssmd_cover_images"
FEATURES, KEYS_AND_VALUES = ("features",), ("keys", "values")


@dataclass(frozen=True)
class Maker:
    """What encoded references depend on.

    Attributes:
        base: the base model's name. fingerprint: of the network that encoded them.
        sites: site -> width of its tokens.
        kinds: of each token's P tensors, in the order of `EncodedReference.tokens`.
    """

    base: str
    fingerprint: str
    sites: Mapping[str, int]
    kinds: Sequence[str] = FEATURES


def describe_maker(network: RetrievalControlNet) -> Maker:
    """A trained network as the maker of references."""
    fingerprint = fingerprint_weights(network.state_dict())
    return Maker(network.card.base, fingerprint, network.config.site_channels())


def save_references(
    path: str | os.PathLike[str],
    references: Sequence[EncodedReference],
    maker: Maker,
) -> None:
    """Writes encoded references atomically as one safetensors file.

    Raises:
        RetrievalError: there is nothing to save, or the file cannot be written.
    """
    if not references:
        raise RetrievalError("There are no references to save; encode at least one.")
    tensors: dict[str, Tensor] = {}
    for index, reference in enumerate(references):
        for site, tokens in reference.tokens.items():
            for kind, tensor in zip(maker.kinds, tokens, strict=True):
                tensors[f"{index}.{kind}.{site}"] = tensor
        if reference.thumbnail is not None:
            tensors[f"{index}.thumbnail"] = reference.thumbnail
    about = [
        {"weight": r.weight, "concept": r.concept, "latent_size": r.latent_size} for r in references
    ]
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "base": maker.base,
        "fingerprint": maker.fingerprint,
        "references": json.dumps(about),
    }
    cover = draw_thumbnails([r.thumbnail for r in references if r.thumbnail is not None])
    if cover is not None:
        metadata[COVER] = json.dumps([encode_base64_jpeg(cover)])
    save_safetensors(path, tensors, metadata)


def load_references(path: str | os.PathLike[str], maker: Maker) -> list[EncodedReference]:
    """Reads references that `maker` encoded, bit for bit as they were saved.

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
    if int(version) == 1 and tuple(maker.kinds) == FEATURES:
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
        entries = [
            (check_weight(e["weight"]), str(e["concept"]), _size(e.get("latent_size", (0, 0))))
            for e in about
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise RetrievalError(
            f"The list of references in '{path}' cannot be read ({error}); save them again."
        ) from error
    keys = [
        {site: [f"{i}.{kind}.{site}" for kind in maker.kinds] for site in maker.sites}
        for i in range(len(entries))
    ]
    expected = {
        key: maker.sites[site]
        for of_reference in keys
        for site, own in of_reference.items()
        for key in own
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
        {site: torch.stack([tensors[key] for key in own]) for site, own in of_reference.items()}
        for of_reference in keys
    ]
    thumbnails = {key: tensors[key].clone() for key in pictures}
    return [
        EncodedReference(tokens, weight, concept, size, thumbnails.get(f"{i}.thumbnail"))
        for i, (tokens, (weight, concept, size)) in enumerate(zip(read, entries, strict=True))
    ]


def _uneven(
    tensors: Mapping[str, Tensor], keys: Sequence[Mapping[str, Sequence[str]]]
) -> list[str]:
    """Keys of a site that differ in number or type, or are not floating-point numbers."""
    return [
        own[0]
        for of_reference in keys
        for own in of_reference.values()
        if len({(len(tensors[key]), tensors[key].dtype) for key in own}) != 1
        or not tensors[own[0]].is_floating_point()
    ]


def _size(value: Sequence[int]) -> tuple[int, int]:
    height, width = map(int, value)
    return height, width


def _is_picture(tensor: Tensor) -> bool:
    return tensor.dtype == torch.uint8 and tensor.ndim == 3 and tensor.shape[2] == 3
