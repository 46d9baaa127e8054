"""The value of RETRIEVAL_REFERENCES, and encoding of references on the host's device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ...retrieval_core.bank.encoding import split_features
from ...retrieval_core.bank.site_bank import Bank, SiteBank
from ...retrieval_core.bank.thumbnails import draw_thumbnails, make_thumbnail
from ...retrieval_core.bank.token_budget import Budget
from ...retrieval_core.bank.tokens import EncodedReference, check_weight, join_references
from ...retrieval_core.data.placing import Region, place_region
from ...retrieval_core.data.prepare import (
    PreparedReference,
    digest_reference,
    keep_subject,
    prepare,
)
from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.network.controlnet import NATIVE_SIZE
from ...retrieval_core.training_free.subject_mask import LEAST_COVERED
from .base_model import check_given, identify_model
from .loading import make_progress
from .reference_network import ReferenceNetwork

# Load Image's mask of a picture without transparency: zeros of this size.
_PLACEHOLDER = (64, 64)


@dataclass(eq=False)
class References:
    """Encoded references on the CPU, and the network that encoded them.

    Caches the last bank by token budget, until one of another budget is made.
    """

    network: ReferenceNetwork
    encoded: tuple[EncodedReference, ...] = ()
    _banks: dict[Any, Bank] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict) -> References:
        return self

    def get_ram_usage(self) -> int:
        """Bytes, for the host's cache."""
        banks = sum(bank.nbytes() for bank in self._banks.values())
        return banks + sum(reference.nbytes() for reference in self.encoded)

    def described(self) -> tuple[EncodedReference, ...]:
        """The references without their tokens."""
        return tuple(replace(reference, tokens={}) for reference in self.encoded)

    def bank(self, budget: Budget = None) -> Bank:
        """The bank of all references, on the CPU.

        Args:
            budget: see `token_budget.choose_budgets`.

        Raises:
            RetrievalError: all weights are 0.
        """
        if budget not in self._banks:
            bank = self.network.make_bank(join_references(self.encoded), budget)
            self._banks.clear()
            self._banks[budget] = bank
        return self._banks[budget]

    def site_bank(self, site: str, budget: Budget = None) -> SiteBank:
        """One site of the bank with all tokens, also where `budget` merges them."""
        bank, tokens = self.bank(budget), join_references(self.encoded).at(site)
        null = 1
        if bank.sites[site].keys.shape[1] == null + tokens.sites[site].tokens.shape[2]:
            return bank.sites[site]
        return self.network.make_bank(tokens, None).sites[site]


# The references encoded last, by network, models, concept, size, whether the subject is found, and
# pixels, for as long as the host runs; the least recently used go first beyond `CACHED_BYTES`.
cache: OrderedDict[tuple, EncodedReference] = OrderedDict()
CACHED_BYTES = 256 << 20


def list_earlier(
    references: References | None, network: ReferenceNetwork
) -> tuple[EncodedReference, ...]:
    """The references that a node is to add others to.

    Raises:
        RetrievalError: `network` has other weights than encoded them.
    """
    if references is None:
        return ()
    made_by = references.network
    if made_by.maker.fingerprint != network.maker.fingerprint:
        raise RetrievalError(
            f"The references to add to were encoded by '{made_by.name}' (base '{made_by.base}') "
            f"and this node encodes with '{network.name}' (base '{network.base}'); encode all of "
            "them with the same network."
        )
    return references.encoded


def encode_references(
    network: ReferenceNetwork,
    images: Tensor,
    vae: Any,
    clip: Any,
    concept: str,
    weight: float = 1.0,
    masks: Tensor | None = None,
    size: int = 0,
    mask_marks: str = "subject",
    automatic: bool = True,
) -> tuple[EncodedReference, ...]:
    """Encodes a batch of images, one reference an image, on the host's device.

    Args:
        images: [R, H, W, 3] in 0..1. masks: [H, W] or [M, H, W] of any size, repeated over the
            batch as the host does, or None. Zeros of Load Image's placeholder size are no mask.
        concept: the text that says what to take. weight: of every reference of the batch.
        size: edge in pixels that references are scaled to; 0 for the base model's own.
        mask_marks: what is white in the masks.
        automatic: find the subject of images without a mask (`ReferenceNetwork.find_subject`).

    Raises:
        RetrievalError: no images, a mask that selects nothing, or a VAE or CLIP of another base.
    """
    weight = check_weight(weight)
    size = size or NATIVE_SIZE[network.base]
    subjects = _list_subjects(images, masks, mask_marks)
    pairs = zip(images, subjects, strict=True)
    prepared = [prepare(i[..., :3].float(), m, concept, size=size) for i, m in pairs]
    found = [automatic and subject is None for subject in subjects]
    made_by: tuple = ()
    if vae is not None and clip is not None:
        made_by = (identify_model(vae.patcher), identify_model(clip.patcher), clip.layer_idx)
    shared = (network.maker.fingerprint, network.identity, made_by, concept, size)
    keys = [(*shared, f, digest_reference(r)) for r, f in zip(prepared, found, strict=True)]
    results = {key: cache.get(key) for key in keys}
    missing = [i for i, key in enumerate(keys) if results[key] is None and keys.index(key) == i]
    if missing:
        chosen, find = {i: prepared[i] for i in missing}, {i for i in missing if found[i]}
        with torch.inference_mode():
            encoded = _encode_chosen(network, chosen, find, vae, clip, concept, size)
        results |= {keys[i]: reference for i, reference in encoded.items()}
    for key, reference in results.items():
        cache[key] = reference
        cache.move_to_end(key)
    while sum(reference.nbytes() for reference in cache.values()) > CACHED_BYTES:
        cache.popitem(last=False)
    return tuple(replace(results[key], weight=weight) for key in keys)


def _encode_chosen(
    network: ReferenceNetwork,
    chosen: Mapping[int, PreparedReference],
    find: Collection[int],
    vae: Any,
    clip: Any,
    concept: str,
    size: int,
) -> dict[int, EncodedReference]:
    """Encodes references of any numbers; those in `find` again without the background of what is
    found, which the first time was seen."""
    encoded, progress = {}, make_progress()
    done, total, least = 0, len(chosen), 0.0
    context, pooled = _encode_text(network, vae, clip, concept)
    while chosen:
        latents, masked = _encode_pictures(network, list(chosen.values()), vae), {}
        for (i, reference), latent in zip(chosen.items(), latents.split(1), strict=True):
            thumbnail = make_thumbnail(reference.image)
            progress(done, total, thumbnail)
            features = network.encode(latent, context, pooled, size)
            subject = network.find_subject(features, reference) if i in find else None
            done += 1
            if subject is not None:
                masked[i] = keep_subject(reference, subject)
                total += 1
                continue
            features = {site: features[site] for site in network.maker.sites}
            masks, shape = [reference.mask], latent.shape[2:]
            (one,) = split_features(features, shape, masks, concepts=[concept], least=least)
            encoded[i] = replace(one.to("cpu"), thumbnail=thumbnail)
        chosen, find, least = masked, (), LEAST_COVERED
    progress(done, total)
    return encoded


def draw_references(references: Sequence[EncodedReference]) -> Tensor | None:
    """Draws the references' thumbnails on one sheet: an IMAGE [1, H, W, 3], or None of none."""
    shown = draw_thumbnails([r.thumbnail for r in references if r.thumbnail is not None])
    return None if shown is None else shown[None].float() / 255


def draw_masks(references: Sequence[EncodedReference], height: int, width: int) -> Tensor:
    """What was kept of images [height, width]: a MASK [R, height, width]."""
    masks = torch.ones(len(references), height, width)
    for drawn, mask in zip(masks, (reference.mask for reference in references), strict=True):
        if mask is not None:
            left, top, right, bottom = place_region(Region((0, 0, width, height)), len(mask)).inside
            shown = mask[None, None, top:bottom, left:right].float()
            drawn.copy_(F.interpolate(shown, (height, width), mode="bilinear")[0, 0])
    return masks


def _list_subjects(
    images: Tensor, masks: Tensor | None, mask_marks: str
) -> Sequence[Tensor | None]:
    """The mask of each image's subject [H, W]; None where none was given."""
    if images.ndim != 4 or not images.numel():
        raise RetrievalError(
            f"The batch of reference images is empty (shape {list(images.shape)}); connect at "
            "least one image."
        )
    if masks is None:
        return [None] * len(images)
    masks = masks[None] if masks.ndim == 2 else masks.reshape(-1, *masks.shape[-2:])
    if not masks.numel():
        raise RetrievalError(
            f"The batch of masks is empty (shape {list(masks.shape)}); connect a mask, or none."
        )
    fitted = comfy.utils.repeat_to_batch_size(masks, len(images))
    return [_subject(mask, mask_marks) for mask in fitted]


def _subject(mask: Tensor, mask_marks: str) -> Tensor | None:
    """The mask of the subject [H, W]; None for the placeholder."""
    if mask.shape == _PLACEHOLDER and not mask.any():
        return None
    subject = 1 - mask.float() if mask_marks == "background" else mask
    if subject.max() <= 0:
        other = "subject" if mask_marks == "background" else "background"
        raise RetrievalError(
            f"With mask_marks set to {mask_marks}, the mask of {mask.shape[1]} x {mask.shape[0]} "
            f"pixels leaves no subject to take; set it to {other}, or connect another mask."
        )
    return subject


def _encode_text(
    network: ReferenceNetwork, vae: Any, clip: Any, concept: str
) -> tuple[Tensor, Tensor | None]:
    """Context [1, L, D] and pooled output of the concept."""
    width = network.config.context_dim
    check_given(vae, clip)
    context, pooled = clip.encode_from_tokens(clip.tokenize(concept), return_pooled=True)
    if context.shape[-1] != width:
        raise RetrievalError(
            f"The CLIP given makes text of width {context.shape[-1]} and '{network.name}' "
            f"(base '{network.base}') reads {width}; connect the CLIP of the base model."
        )
    return context, pooled


def _encode_pictures(
    network: ReferenceNetwork, prepared: Sequence[PreparedReference], vae: Any
) -> Tensor:
    """Clean latents [R, C, h, w]."""
    channels = network.latent_format.latent_channels
    pixels = torch.stack([reference.image.movedim(0, -1) for reference in prepared])
    latents = network.latent_format.process_in(vae.encode(pixels))
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise RetrievalError(
            f"The VAE given makes latents of {latents.shape[1]} channels and '{network.name}' "
            f"(base '{network.base}') reads {channels}; connect the VAE of the base model."
        )
    return latents
