"""Thumbnails of references, stored with their tokens for files and previews."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

EDGE = 128
_QUALITY = 85
_MOST = 36  # thumbnails on a sheet, which lists show small


def make_thumbnail(image: Tensor) -> Tensor:
    """uint8 [h, w, 3], no edge above `EDGE`, of an image [3, H, W] in 0..1."""
    scale = min(1.0, EDGE / max(image.shape[-2:]))
    size = [max(1, round(edge * scale)) for edge in image.shape[-2:]]
    small = F.interpolate(image[None].float(), size=size, mode="area")[0]
    return (small.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1).contiguous()


def draw_thumbnails(thumbnails: Sequence[Tensor]) -> Tensor | None:
    """Draws thumbnails on a nearly square grid, uint8 [H, W, 3]; None if there are none."""
    shown = thumbnails[:_MOST]
    if not shown:
        return None
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    height, width = (max(t.shape[axis] for t in shown) for axis in (0, 1))
    canvas = torch.full((rows * height, columns * width, 3), 128, dtype=torch.uint8)
    for i, picture in enumerate(shown):
        top = i // columns * height + (height - picture.shape[0]) // 2
        left = i % columns * width + (width - picture.shape[1]) // 2
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def encode_base64_jpeg(picture: Tensor) -> str:
    """Encodes a picture, uint8 [H, W, 3], as base64 text of a JPEG."""
    data = io.BytesIO()
    Image.fromarray(np.asarray(picture.cpu())).save(data, "JPEG", quality=_QUALITY)
    return base64.b64encode(data.getvalue()).decode("ascii")
