"""Saves and loads encoded references, which a fingerprint binds to the network that encoded them.

File format: one safetensors file, of each reference i keys `<i>.<kind>.<site>`, [N, D], and
optionally `<i>.thumbnail`, uint8 [h, w, 3]. The kinds are `features`, or `keys` and `values` in the
training-free mode. Metadata: `format`, `format_version` (1 had keys and values in both modes),
`base`, `fingerprint`, `references` (JSON list of weight, concept and latent_size), and
`ssmd_cover_images` (JSON list of base64 images), from which ComfyUI takes a file's preview.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RetrievalError
from ..files import check_format, read_safetensors, save_safetensors
from .thumbnails import draw_thumbnails, encode_base64_jpeg
from .tokens import EncodedReference, check_weight

FORMAT = "retrieval_references"
FORMAT_VERSION = 2
COVER = "ssmd_cover_images"
FEATURES, KEYS_AND_VALUES = ("features",), ("keys", "values")


@dataclass(frozen=True)
class Maker:
    """The network that encoded references.

    Attributes:
        base: the base model's name. fingerprint: `fingerprint_weights` of the network.
        sites: site -> width of its tokens.
        kinds: names of the P tensors of `EncodedReference.tokens`, in order.
    """

    base: str
    fingerprint: str
    sites: Mapping[str, int]
    kinds: Sequence[str] = FEATURES


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
    """Loads references that `maker` encoded, bit for bit as they were saved.

    Raises:
        RetrievalError: no such file, truncated, another format, a newer version, made by another
            network, or keys that do not fit the network.
    """
    tensors, metadata = read_safetensors(path)
    check_format(path, metadata, FORMAT, "choose a file of saved references", FORMAT_VERSION)
    if metadata["format_version"] == "1" and tuple(maker.kinds) == FEATURES:
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
        entries = [_parse_entry(entry) for entry in json.loads(metadata.get("references", ""))]
    except (ValueError, TypeError, KeyError) as error:
        raise RetrievalError(
            f"The list of references in '{path}' cannot be read ({error}); save them again."
        ) from error
    keys = [
        {site: [f"{i}.{kind}.{site}" for kind in maker.kinds] for site in maker.sites}
        for i in range(len(entries))
    ]
    expected = {key for sites in keys for own in sites.values() for key in own}
    pictures = {f"{i}.thumbnail" for i in range(len(entries))} & tensors.keys()
    wrong = sorted(expected ^ (tensors.keys() - pictures)) or [
        own[0]
        for sites in keys
        for site, own in sites.items()
        if not _are_tokens([tensors[key] for key in own], maker.sites[site])
    ]
    wrong += sorted(key for key in pictures if not _is_picture(tensors[key]))
    if wrong or not entries:
        raise RetrievalError(
            f"'{path}' does not hold what its list of {len(entries)} references says (first wrong "
            f"key: {wrong[0] if wrong else 'none at all'}); save the references again."
        )
    # Copies: safetensors maps the file, which may be overwritten.
    thumbnails = {key: tensors[key].clone() for key in pictures}
    return [
        EncodedReference(
            {site: torch.stack([tensors[key] for key in own]) for site, own in sites.items()},
            *entry,
            thumbnails.get(f"{i}.thumbnail"),
        )
        for i, (sites, entry) in enumerate(zip(keys, entries, strict=True))
    ]


def _parse_entry(entry: Mapping[str, Any]) -> tuple[float, str, tuple[int, int]]:
    weight, concept = check_weight(entry["weight"]), str(entry["concept"])
    height, width = map(int, entry.get("latent_size", (0, 0)))
    return weight, concept, (height, width)


def _are_tokens(tensors: Sequence[Tensor], width: int) -> bool:
    """Whether the tensors are [N, width] of one N and one floating-point type."""
    first = tensors[0]
    shape, dtype = (*first.shape[:1], width), first.dtype
    return dtype.is_floating_point and all(t.shape == shape and t.dtype == dtype for t in tensors)


def _is_picture(tensor: Tensor) -> bool:
    return tensor.dtype == torch.uint8 and tensor.ndim == 3 and tensor.shape[2] == 3
