"""From what was read of a batch of references to one `EncodedReference` each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ..data.prepare import token_mask
from ..errors import RetrievalError
from .tokens import EncodedReference

# site -> (tokens [R, P, H * W, D] as in `EncodedReference`, (H, W)).
Reading = Mapping[str, tuple[Tensor, tuple[int, int]]]


def split(
    reading: Reading,
    masks: Iterable[Tensor | None],
    weights: Sequence[float] | None = None,
    concepts: Sequence[str] | None = None,
) -> list[EncodedReference]:
    """What was read as one `EncodedReference` each, tokens wholly outside its mask left out.

    Args:
        masks: one [H, W] mask a reference, of any size, above 0 where it counts; None: all.
        weights: one a reference, 1 by default. concepts: recorded with each reference.

    Raises:
        RetrievalError: a mask selects nothing.
    """
    encoded, masks = [], list(masks)
    for i, mask in enumerate(masks):
        if mask is not None and not bool((mask > 0).any()):
            raise RetrievalError(
                f"The mask of reference {i + 1} of {len(masks)} selects nothing; select what is to "
                "be taken, or leave the mask out."
            )
        kept: dict[tuple[int, int], Tensor] = {}
        tokens = {}
        for site, (read, size) in reading.items():
            own = read[i]
            if mask is not None:
                if size not in kept:
                    kept[size] = token_mask(mask, *size).flatten().to(own.device)
                own = own[:, kept[size]]
            tokens[site] = own
        encoded.append(
            EncodedReference(
                tokens,
                1.0 if weights is None else weights[i],
                "figure" if concepts is None else concepts[i],
            )
        )
    return encoded
