"""Contact sheet of a data set, to check by eye: a row per outfit, annotations drawn in.

The head box is a frame. What the figure's mask leaves out is tinted, so that clothes keep their
colours.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..errors import RetrievalError
from ..sheets import TILE, Row, Tile, choose_colour, draw_sheet, save_png
from .concepts import find_figure_region
from .data_set import DataSet
from .placing import place_mask, place_picture, place_region
from .sample import NEUTRAL, Sample

ROWS, COLUMNS = 16, 8
OUTFITS_EACH = 3  # rows of one character and artist
TINT = 0.6
CAPTION = 20  # characters that fit below a picture


def write_contact_sheet(data_set: DataSet, path: Path) -> None:
    """Writes `draw_contact_sheet`'s picture; RetrievalError also if it cannot be written."""
    save_png(path, draw_contact_sheet(data_set))


def draw_contact_sheet(data_set: DataSet, count: int = ROWS) -> Image.Image:
    """A picture of up to `count` outfits of characters spread over the data set.

    Raises RetrievalError if the data set is empty, or a picture cannot be read.
    """
    if not len(data_set):
        raise RetrievalError(
            f"The data set '{data_set.folder}' is empty; build it from other sources."
        )
    rows = [_make_row(data_set, members) for members in choose_outfits(data_set, count)]
    subtitle = (
        f"{len(data_set)} pictures of {data_set.info['counts']['characters']} characters; the head "
        "box is framed, what the mask leaves out tinted"
    )
    return draw_sheet(data_set.folder.name, subtitle, rows)


def choose_outfits(data_set: DataSet, count: int) -> list[np.ndarray]:
    """The rows of up to `count` outfits, those of one character and artist one after the other.

    The largest outfits come first. Pictures of unknown outfits count as one, the last.
    """
    identities = data_set.identities.members
    shown = min(len(identities), max(1, count // OUTFITS_EACH))
    spread = np.unique(np.linspace(0, len(identities) - 1, shown).round().astype(int))
    outfit = data_set.index["outfit"].to_numpy()
    chosen: list[np.ndarray] = []
    for members in (identities[i] for i in spread.tolist()):
        groups = [members[outfit[members] == number] for number in np.unique(outfit[members])]
        groups.sort(key=lambda rows: (outfit[rows[0]] < 0, -len(rows)))
        chosen += groups[:OUTFITS_EACH]
    return chosen[:count]


def _make_row(data_set: DataSet, members: np.ndarray) -> Row:
    first = data_set.read_row(int(members[0]))
    outfit = "outfit unknown" if first["outfit"] < 0 else f"outfit {first['outfit']}"
    count = "1 picture" if len(members) == 1 else f"{len(members)} pictures"
    split = first["split"].replace("_", " ")
    artist = first["artist"] or "an unknown artist"
    title = f"{first['character']}, by {artist}: {outfit}, {count}, {split}"
    tiles = [
        Tile(_draw_sample(data_set[row]), _shorten(data_set.index["image"][row].as_py()))
        for row in islice(members.tolist(), COLUMNS)
    ]
    return Row(title, (), tiles)


def _draw_sample(sample: Sample) -> torch.Tensor:
    """The padded picture with its annotations, [3, `TILE`, `TILE`] in 0..1."""
    placement = place_region(find_figure_region(sample), TILE)
    pixels = place_picture(sample.image, placement, NEUTRAL).astype(np.float32)
    if sample.mask is not None:
        tint = 255 * np.array(choose_colour(4), np.float32)
        outside = ~place_mask(sample.mask, placement)
        pixels[outside] += TINT * (tint - pixels[outside])
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    if sample.head_box is not None:
        x0, y0, x1, y1 = placement.place_box(sample.head_box)
        colour = tuple(round(255 * c) for c in choose_colour(0))
        ImageDraw.Draw(picture).rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=2)
    return torch.from_numpy(np.asarray(picture).copy()).movedim(-1, 0) / 255


def _shorten(image: str) -> str:
    name = Path(image).name
    return name if len(name) <= CAPTION else f"...{name[3 - CAPTION :]}"
