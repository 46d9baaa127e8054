"""Prepares references at inference: a file or an array becomes a padded square (§4.3, §5.1)."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ..bank.tokens import check_weight
from ..errors import RetrievalError
from .placing import Region, place_picture, place_region
from .sample import NEUTRAL

# Pillow only warns at this number of pixels, and the host may have disabled its check.
LARGEST_IMAGE = 89_478_485
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


@dataclass(frozen=True, eq=False)
class PreparedReference:
    """A reference ready for the VAE.

    image: float32 [3, S, S] in 0..1. mask: float32 [S, S] in 0..1, above 0 on selected content,
    or None if the whole square is content. concept: what to take from it. weight: 0 or more; 0
    leaves it out.
    """

    image: Tensor
    mask: Tensor | None
    concept: str = "figure"
    weight: float = 1.0


def digest_reference(reference: PreparedReference) -> str:
    """The SHA-256 of a reference's pixels and mask, in hexadecimal."""
    digest = hashlib.sha256(str(tuple(reference.image.shape)).encode())
    digest.update(reference.image.contiguous().numpy().tobytes())
    if reference.mask is not None:
        digest.update(reference.mask.contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_image(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Loads an image file of any format that Pillow reads, rotated upright by its EXIF tag.

    Palettes, greys, 16 bits, CMYK and alpha are converted; of an animation the first frame is
    used. Transparent pixels are composited on neutral grey.

    Returns:
        uint8 [H, W, 3] and the alpha channel, float32 [H, W] in 0..1, or None if all is opaque.

    Raises:
        RetrievalError: missing, a folder, not readable, truncated, not an image, too large, or
            transparent throughout.
    """
    path = Path(path)
    if path.is_dir():
        raise RetrievalError(f"'{path}' is a folder; name one image file in it.")
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise RetrievalError(
            f"There is no file '{path}'; check the name and the folder."
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or error
        raise RetrievalError(
            f"The file '{path}' cannot be read ({reason}); check its name and permissions."
        ) from error
    with file:
        return decode_image(file, path)


def decode_image(
    file: BinaryIO, name: str | os.PathLike[str]
) -> tuple[np.ndarray, np.ndarray | None]:
    """`load_image` of an open file; name: what errors call it."""
    image = _decode(file, name)
    alpha = None
    if image.mode == "RGBA":
        opacity = image.getchannel("A")
        lowest, highest = opacity.getextrema()
        if highest == 0:
            raise RetrievalError(
                f"'{name}' is transparent throughout, so there is nothing to take from it; use an "
                "image with visible content."
            )
        if lowest < 255:
            alpha = np.asarray(opacity, np.float32) / 255
        canvas = Image.new("RGB", image.size, NEUTRAL)
        canvas.paste(image.convert("RGB"), mask=opacity)
        image = canvas
    return np.array(image), alpha


def pad_to_square(
    image: np.ndarray, mask: np.ndarray | None, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scales an image to fit a square of `size` pixels, centred and never squashed (§4.3).

    The shorter edge comes out at least one pixel long.

    Args:
        image: uint8 [H, W, 3]. mask: float32 [H, W] in 0..1, or None for the whole image.

    Returns:
        The square, uint8 [S, S, 3], padded with `NEUTRAL`, and its mask, float32 [S, S] in 0..1:
        0 in the padding, above 0 in every pixel that covers any of the mask.
    """
    height, width = image.shape[:2]
    placement = place_region(Region((0, 0, width, height)), size)
    square = place_picture(image, placement, NEUTRAL)
    left, top, right, bottom = placement.inside
    inside = np.zeros((size, size), np.float32)
    if mask is None:
        inside[top:bottom, left:right] = 1
    else:
        # Pooled over every pixel touched, so that no selection is too thin to remain.
        given = torch.from_numpy(mask)[None, None]
        pooled = F.adaptive_avg_pool2d(given, (bottom - top, right - left))
        inside[top:bottom, left:right] = pooled[0, 0].numpy()
    return square, inside


def fill_background(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Blends uint8 [H, W, 3] with `NEUTRAL` by a mask [H, W]: 1 is the image, 0 grey (§4.3)."""
    opacity = Image.fromarray(np.rint(mask * 255).astype(np.uint8))
    picture = Image.fromarray(image)
    return np.array(Image.composite(picture, Image.new("RGB", picture.size, NEUTRAL), opacity))


def fit_mask(mask: np.ndarray | Tensor, height: int, width: int) -> np.ndarray:
    """Converts a mask to float32 [height, width] in 0..1, resized bilinearly as ComfyUI does.

    Args:
        mask: [H, W] or [1, H, W] of any size; bool, float in 0..1, or integers (0 and 1, or
            0..255).

    Raises:
        RetrievalError: another shape, NaN in it, or nothing selected.
    """
    given = torch.as_tensor(mask).detach().cpu()
    if given.ndim == 3 and given.shape[0] == 1:
        given = given[0]
    if given.ndim != 2 or not given.numel():
        raise RetrievalError(
            f"The mask has shape {list(given.shape)}; give one mask of [height, width]."
        )
    values = given.float()
    if not given.is_floating_point() and values.max() > 1:
        values = values / 255
    if values.isnan().any():
        raise RetrievalError(
            f"The mask has {int(values.isnan().sum())} NaN values in {list(given.shape)}; give "
            "numbers from 0 (left out) to 1 (taken)."
        )
    values = values.clamp(0, 1)
    if values.max() <= 0:
        raise RetrievalError(
            f"The mask is empty (none of its {given.shape[1]} x {given.shape[0]} pixels is "
            "selected); select the figure, or leave the mask out."
        )
    if given.shape != (height, width):
        resized = F.interpolate(values[None, None], (height, width), mode="bilinear")[0, 0]
        if resized.max() <= 0:  # bilinear steps over a selection thinner than its stride
            resized = F.adaptive_max_pool2d(values[None, None], (height, width))[0, 0]
        values = resized
    return values.numpy()


def prepare(
    image: np.ndarray | Tensor,
    mask: np.ndarray | Tensor | None = None,
    concept: str = "figure",
    weight: float = 1.0,
    size: int = 64,
) -> PreparedReference:
    """Prepares one reference: fills the background outside a mask, pads, converts to tensors.

    Args:
        image: [H, W, 3], uint8 or float in 0..1 (one image of ComfyUI's batch).
        mask: [H, W] of any size, or None for the whole image. size: edge of the square in pixels.

    Raises:
        RetrievalError: no image of that shape or type, a size below 1, or a mask or weight that
            `fit_mask` or `check_weight` refuses.
    """
    weight = check_weight(weight)
    if size < 1:
        raise RetrievalError(f"The reference size is {size} pixels; it must be 1 or more.")
    pixels = _as_uint8(image)
    if mask is not None:
        # At full resolution, before any resampling could blend the background in.
        mask = fit_mask(mask, *pixels.shape[:2])
        pixels = fill_background(pixels, mask)
    square, inside = pad_to_square(pixels, mask, size)
    tensor = torch.from_numpy(square).permute(2, 0, 1).float().div(255).contiguous()
    whole = mask is None and bool((inside > 0).all())
    return PreparedReference(tensor, None if whole else torch.from_numpy(inside), concept, weight)


def keep_subject(reference: PreparedReference, subject: Tensor) -> PreparedReference:
    """A reference with the mask of its subject, bool [S, S], and grey outside it."""
    grey = reference.image.new_tensor(NEUTRAL)[:, None, None] / 255
    image = torch.where(subject, reference.image, grey)
    return replace(reference, image=image, mask=subject.float())


def _decode(file: BinaryIO, path: str | os.PathLike[str]) -> Image.Image:
    """Decodes an open file to an upright image of mode RGB or RGBA."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
        width, height = image.size
        if width * height > LARGEST_IMAGE:
            raise RetrievalError(
                f"'{path}' has {width} x {height} pixels, more than the {LARGEST_IMAGE} allowed; "
                "scale it down first."
            )
        image.load()
        image = ImageOps.exif_transpose(image)
        return convert_mode(image)
    except RetrievalError:
        raise
    except Image.DecompressionBombError as error:
        raise RetrievalError(
            f"'{path}' is too large to open safely ({error}); scale it down first."
        ) from error
    except Image.UnidentifiedImageError as error:
        raise RetrievalError(
            f"'{path}' is not an image in a format that can be read; use a PNG, JPEG or WebP file."
        ) from error
    except Exception as error:  # Pillow's decoders raise a dozen classes on damaged data
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise RetrievalError(
            f"The image '{path}' is damaged or truncated ({reason}); copy or save it again."
        ) from error


def convert_mode(image: Image.Image) -> Image.Image:
    """Converts to RGB or RGBA; Pillow itself would clip greys of more than eight bits to white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, np.float32), posinf=0.0, neginf=0.0)
        highest = float(values.max())
        # Floating-point greys are 0..1 by convention; integers fill their number of bits.
        limits = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
        limit = next((limit for limit in limits if highest <= limit), highest)
        grey = Image.fromarray(np.rint((values / limit).clip(0, 1) * 255).astype(np.uint8))
        hidden = image.info.get("transparency")
        if isinstance(hidden, int):
            opacity = Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8))
            return Image.merge("RGBA", (grey, grey, grey, opacity))
        return grey.convert("RGB")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        # Pillow converts premultiplied La only to LA.
        image = image.convert("LA") if image.mode == "La" else image
        return image.convert("RGBA")
    return image.convert("RGB")


def _as_uint8(image: np.ndarray | Tensor) -> np.ndarray:
    """Converts an image of bytes, or of floats in 0..1, to uint8 [H, W, 3]."""
    pixels = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise RetrievalError(
            f"The reference image has shape {list(pixels.shape)}; give [height, width, 3]."
        )
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating) or not np.isfinite(pixels).all():
        raise RetrievalError(
            f"The reference image is {pixels.dtype} from {pixels.min()} to {pixels.max()}; give "
            "bytes, or finite floats from 0 to 1."
        )
    return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
