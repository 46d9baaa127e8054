"""UI outputs that web/ draws on nodes: thumbnails of references, and a map of their shares."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import ui
from torch import Tensor

from ...retrieval_core.bank.tokens import MATCHED, EncodedReference
from ...retrieval_core.sheets import choose_colour
from .recorder import Recorder
from .reference_network import ReferenceNetwork


def show_references(
    references: Sequence[EncodedReference], network: ReferenceNetwork, cls: Any
) -> dict[str, list]:
    """Thumbnail, concept, weight and share of tokens inside the mask, of each reference."""
    described = _describe(references, cls)
    for one, reference in zip(described, references, strict=True):
        one["kept"] = measure_kept(reference, network)
    return {"retrieval_references": described}


def measure_kept(reference: EncodedReference, network: ReferenceNetwork) -> float:
    """The share of the picture's tokens that are stored, at the finest site; 1 without a mask."""
    factors = network.site_downsampling()
    site = min(reference.tokens, key=factors.__getitem__)
    height, width = (math.ceil(edge / factors[site]) for edge in reference.latent_size)
    tokens = reference.tokens[site]
    kept = int(tokens[1].any(-1).sum()) if site.startswith(MATCHED) else tokens.shape[1]
    return kept / (height * width)


def show_map(recorder: Recorder, pictures: Tensor, cls: Any) -> dict[str, list]:
    """The pictures [B, H, W, 3] and the shares of each reference at each position of the map.

    The shares [B, 1 + references, h, w], the null token's first, are base64 text of bytes, 255 for
    a share of 1; empty where nothing was recorded.
    """
    shares, references = recorder.shares(), recorder.references()
    made: dict[str, Any] = {
        "pictures": ui.PreviewImage(pictures[..., :3], cls=cls).values,
        "references": [],
        "height": 0,
        "width": 0,
        "shares": "",
    }
    if shares is not None:
        bytes_ = (shares * 255).round().byte().contiguous().numpy().tobytes()
        made |= {
            "references": _describe(references, cls),
            "height": shares.shape[2],
            "width": shares.shape[3],
            "shares": base64.b64encode(bytes_).decode("ascii"),
        }
    return {"retrieval_map": [made]}


def _describe(references: Sequence[EncodedReference], cls: Any) -> list[dict[str, Any]]:
    """Each reference as JSON; `image` is the thumbnail's file in the host's temp folder."""
    described = []
    for i, reference in enumerate(references):
        image = None
        if reference.thumbnail is not None:
            image = ui.PreviewImage(reference.thumbnail[None].float() / 255, cls=cls).values[0]
        described.append(
            {
                "image": image,
                "concept": reference.concept,
                "weight": reference.weight,
                "colour": [round(255 * value) for value in choose_colour(i)],
            }
        )
    return described
