"""Draws a figure of the paper-doll world: 64x64 pixels, its mask and its head box.

A sketch lists the shapes back to front, in units of output pixels. They are drawn at three times
the size, first widened in the outline's colour, so that the figure stands out on any background,
then in their own colours. Averaging 3x3 pixels gives smooth edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from . import world
from .backgrounds import draw_background
from .world import SIZE, Colour, Figure, Identity, Outfit

SCALE = 3
OUTLINE: Colour = (30, 24, 34)
SHOE: Colour = (84, 56, 52)

# Part that a pixel shows; 0 is everything else: the background, outlines, shoes, the mouth.
NOTHING, HAIR, SKIN, EYES, UPPER, LOWER = range(6)
PARTS = 6

Point = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Rendering:
    """A drawn figure.

    image: uint8 [64, 64, 3]. mask: bool [64, 64], True where the figure covers half a pixel or
    more. parts: uint8 [64, 64], the part at each pixel's centre (HAIR, ...). head_box: (x0, y0, x1,
    y1), half open, of the face and the hair on top, without hanging hair.
    """

    image: np.ndarray
    mask: np.ndarray
    parts: np.ndarray
    head_box: tuple[int, int, int, int]
    figure: Figure


@dataclass(frozen=True)
class Stance:
    """Joints of a pose (left, right). drop: the body's downward shift. inverted: upside down."""

    hands: tuple[Point, Point]
    elbows: tuple[Point, Point]
    feet: tuple[Point, Point]
    knees: tuple[Point, Point]
    drop: float = 0.0
    inverted: bool = False


def _mirror_stance(hand: Point, elbow: Point, foot: Point, knee: Point, **kw: float) -> Stance:
    mirrored = [(64 - x, y) for x, y in (hand, elbow, foot, knee)]
    pairs = list(zip((hand, elbow, foot, knee), mirrored))
    return Stance(*pairs, **kw)  # type: ignore[arg-type]


_STRAIGHT = ((28.5, 60.0), (28.7, 52.0))
STANCES: dict[str, Stance] = {
    "standing": _mirror_stance((21.5, 46), (22.5, 40), *_STRAIGHT),
    "waving": Stance(
        ((21.5, 46), (52, 22)), ((22.5, 40), (47, 35)), ((28.5, 60), (35.5, 60)),
        ((28.7, 52), (35.3, 52)),
    ),
    "arms up": _mirror_stance((11, 17), (17, 30), *_STRAIGHT),
    "hands on hips": _mirror_stance((25, 45.5), (14.5, 41), *_STRAIGHT),
    "arms spread": _mirror_stance((8, 36), (17, 36.5), *_STRAIGHT),
    "sitting": _mirror_stance((18, 53), (21, 45), (17.5, 60), (20, 53.5), drop=4.5),
    "jumping": _mirror_stance((11, 27), (18, 35), (15, 54), (22, 53), drop=-3),
    "handstand": _mirror_stance((16, 9), (18, 24), (21, 60), (25.5, 53), inverted=True),
}  # fmt: skip


@dataclass
class Sketch:
    """Shapes back to front: (kind, points, width, colour, part). part: of the shapes added next."""

    shapes: list[tuple[str, Sequence[Point], float, Colour, int]] = field(default_factory=list)
    part: int = NOTHING

    def polygon(self, colour: Colour, *points: Point) -> None:
        self.shapes.append(("polygon", points, 0.0, colour, self.part))

    def line(self, colour: Colour, width: float, *points: Point) -> None:
        self.shapes.append(("line", points, width, colour, self.part))

    def ellipse(self, colour: Colour, x: float, y: float, rx: float, ry: float) -> None:
        box = ((x - rx, y - ry), (x + rx, y + ry))
        self.shapes.append(("ellipse", box, 0.0, colour, self.part))


def render(figure: Figure) -> Rendering:
    """Draws one figure; deterministic."""
    scene = figure.scene
    stance = STANCES[scene.pose]
    sketch = Sketch()
    _draw_figure(sketch, figure, stance)
    placed = _place(sketch, figure, stance)
    picture = draw_background(scene.background, scene.background_seed)
    picture = picture.resize((SIZE * SCALE, SIZE * SCALE), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    cover = Image.new("L", picture.size)
    stencil = ImageDraw.Draw(cover)
    labels = Image.new("L", picture.size)
    marker = ImageDraw.Draw(labels)
    for kind, points, width, _, _ in placed:
        _stroke(pen, kind, points, width, OUTLINE, 2.0)
        _stroke(stencil, kind, points, width, 255, 2.0)
    for kind, points, width, colour, part in placed:
        _stroke(pen, kind, points, width, colour, 0.0)
        _stroke(marker, kind, points, width, part, 0.0)
    image = np.asarray(picture.reduce(SCALE))
    mask = np.asarray(cover.reduce(SCALE)) >= 128
    parts = np.asarray(labels)[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE]
    return Rendering(image, mask, parts, _find_head_box(figure, stance), figure)


def _draw_figure(sketch: Sketch, figure: Figure, stance: Stance) -> None:
    who, clothes = figure.identity, figure.outfit
    skin, hair = world.SKIN_TONES[who.skin], world.HAIR_COLOURS[who.hair_colour]
    down = stance.drop
    sketch.part = HAIR
    _draw_hair_behind(sketch, who.hair_style, hair, down)
    for foot, knee, hip in zip(stance.feet, stance.knees, ((28.7, 46), (35.3, 46))):
        sketch.part = SKIN
        sketch.line(skin, 5, (hip[0], hip[1] + down), knee, foot)
        sketch.part = NOTHING
        sketch.ellipse(SHOE, foot[0], foot[1], 3.4, 2.2)
    sketch.part = LOWER
    _draw_lower(sketch, clothes, stance)
    sketch.part = SKIN
    for hand, elbow, shoulder in zip(stance.hands, stance.elbows, ((25.5, 34), (38.5, 34))):
        sketch.line(skin, 4.4, (shoulder[0], shoulder[1] + down), elbow, hand)
    sketch.polygon(skin, (29.5, 29 + down), (34.5, 29 + down), (34.5, 34 + down), (29.5, 34 + down))
    sketch.part = UPPER
    _draw_upper(sketch, clothes, stance)
    if clothes.lower == "overalls":
        sketch.part = LOWER
        colour = world.GARMENT_COLOURS[clothes.lower_colour]
        bib = ((28, 37), (36, 37), (37, 46), (27, 46))
        sketch.polygon(colour, *((x, y + down) for x, y in bib))
        for x in (28.4, 35.6):
            sketch.line(colour, 1.7, (x, 32 + down), (x, 38 + down))
    _draw_face(sketch, who, figure.scene.expression, down)
    sketch.part = HAIR
    _draw_hair_front(sketch, who.hair_style, hair, down)


def _place(sketch: Sketch, figure: Figure, stance: Stance) -> list:
    """The sketch's shapes in canvas pixels, inverted, mirrored and shifted as the scene says."""
    move = _make_mover(figure, stance)
    placed = []
    for kind, points, width, colour, part in sketch.shapes:
        moved = [tuple(SCALE * c for c in move(p)) for p in points]
        if kind == "ellipse":
            (x0, y0), (x1, y1) = moved
            moved = [(min(x0, x1), min(y0, y1)), (max(x0, x1), max(y0, y1))]
        placed.append((kind, moved, width * SCALE, colour, part))
    return placed


def _make_mover(figure: Figure, stance: Stance) -> Callable[[Point], Point]:
    right, down = figure.scene.shift
    mirror = figure.scene.mirror

    def move(point: Point) -> Point:
        x, y = point
        if stance.inverted:
            y = 64.5 - y
        if mirror:
            x = 64 - x
        return x + right, y + down * 0.5

    return move


def _stroke(pen, kind: str, points: Sequence[Point], width: float, colour, grow: float) -> None:
    if kind == "polygon":
        pen.polygon(points, fill=colour)
        if grow:
            pen.line([*points, points[0], points[1]], fill=colour, width=round(2 * grow))
    elif kind == "ellipse":
        (x0, y0), (x1, y1) = points
        pen.ellipse((x0 - grow, y0 - grow, x1 + grow, y1 + grow), fill=colour)
    else:
        pen.line(points, fill=colour, width=round(width + 2 * grow))
        radius = width / 2 + grow - 0.5
        for x, y in points:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _find_head_box(figure: Figure, stance: Stance) -> tuple[int, int, int, int]:
    move = _make_mover(figure, stance)
    (x0, y0), (x1, y1) = move((18, 4 + stance.drop)), move((46, 31 + stance.drop))
    left, right, top, bottom = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
    edges = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    return tuple(min(max(edge, 0), SIZE) for edge in edges)  # type: ignore[return-value]


def _tint(colour: Colour) -> Colour:
    """The colour of a pattern on a garment: lighter, or darker on light garments."""
    light = sum(colour) > 480
    target, share = (60, 0.32) if light else (255, 0.42)
    r, g, b = (round(c + (target - c) * share) for c in colour)
    return r, g, b


def _shorten(start: Point, middle: Point, end: Point, share: float) -> list[Point]:
    """The first `share` of the path start - middle - end."""
    first, second = math.dist(start, middle), math.dist(middle, end)
    length = share * (first + second)
    if length <= first:
        return [start, _between(start, middle, length / max(first, 1e-6))]
    return [start, middle, _between(middle, end, (length - first) / max(second, 1e-6))]


def _between(a: Point, b: Point, share: float) -> Point:
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share


def _draw_lower(sketch: Sketch, clothes: Outfit, stance: Stance) -> None:
    colour, kind, d = world.GARMENT_COLOURS[clothes.lower_colour], clothes.lower, stance.drop
    if kind in ("mini skirt", "long skirt"):
        hem = 52.5 if kind == "mini skirt" else 58.0
        hem = min(hem + d, 59.0)
        wide = 10.5 if kind == "mini skirt" else 13.0
        sketch.polygon(colour, (26, 43 + d), (38, 43 + d), (32 + wide, hem), (32 - wide, hem))
        return
    share, width = {"trousers": (0.93, 6.4), "overalls": (0.93, 6.8), "shorts": (0.45, 7.4)}[kind]
    sketch.polygon(colour, (25.6, 43 + d), (38.4, 43 + d), (38.8, 49 + d), (25.2, 49 + d))
    for foot, knee, x in zip(stance.feet, stance.knees, (28.7, 35.3)):
        sketch.line(colour, width, *_shorten((x, 46 + d), knee, foot, share))


# The outline of an upper garment's body, and the box of its pattern.
_SHIRT = (
    ((26, 31.5), (38, 31.5), (39.5, 35), (38.6, 46), (25.4, 46), (24.5, 35)), (26, 34, 38, 45.5)
)  # fmt: skip
_TORSOS = {
    "poncho": (
        ((28, 31), (36, 31), (44, 37), (47.5, 46.5), (16.5, 46.5), (20, 37)), (21, 34, 43, 45.5)
    ),
    "tank top": (((27, 35), (37, 35), (38.2, 46), (25.8, 46)), (27, 36, 37, 45.5)),
}  # fmt: skip


def _draw_upper(sketch: Sketch, clothes: Outfit, stance: Stance) -> None:
    colour, kind, d = world.GARMENT_COLOURS[clothes.upper_colour], clothes.upper, stance.drop
    sleeve = {"t-shirt": 0.42, "sailor shirt": 0.42, "sweater": 0.9, "open jacket": 0.9}.get(kind)
    shoulders = ((25.5, 34 + d), (38.5, 34 + d))
    if sleeve is not None:
        for hand, elbow, shoulder in zip(stance.hands, stance.elbows, shoulders):
            sketch.line(colour, 6.2, *_shorten(shoulder, elbow, hand, sleeve))
    outline, (x0, y0, x1, y1) = _TORSOS.get(kind, _SHIRT)
    sketch.polygon(colour, *((x, y + d) for x, y in outline))
    if kind == "tank top":
        for x in (28.2, 35.8):
            sketch.line(colour, 2.2, (x, 32 + d), (x, 36 + d))
    _draw_pattern(sketch, clothes, (x0, y0 + d, x1, y1 + d))
    if kind == "open jacket":
        shirt = (250, 250, 250) if clothes.upper_colour != "white" else (150, 170, 190)
        sketch.polygon(shirt, (29.2, 31.5 + d), (34.8, 31.5 + d), (34, 46 + d), (30, 46 + d))
    if kind == "sailor shirt":
        collar = (250, 250, 250) if clothes.upper_colour != "white" else (60, 90, 160)
        sketch.polygon(
            collar, (25, 31.5 + d), (39, 31.5 + d), (38.5, 35.5 + d), (32, 40 + d), (25.5, 35.5 + d)
        )
        sketch.polygon(OUTLINE, (32, 37 + d), (35, 43.5 + d), (32, 42 + d), (29, 43.5 + d))


def _draw_pattern(sketch: Sketch, clothes: Outfit, box: tuple[float, float, float, float]) -> None:
    x0, y0, x1, y1 = box
    tint = _tint(world.GARMENT_COLOURS[clothes.upper_colour])
    kind = clothes.upper_pattern
    if kind in ("stripes", "check"):
        for y in np.arange(y0 + 1.5, y1, 4.0 if kind == "stripes" else 4.5).tolist():
            height = 0.9 if kind == "stripes" else 0.55
            sketch.polygon(
                tint, (x0, y - height), (x1, y - height), (x1, y + height), (x0, y + height)
            )
    if kind == "check":
        for x in np.arange(x0 + 2, x1, 4.5).tolist():
            sketch.polygon(tint, (x - 0.55, y0), (x + 0.55, y0), (x + 0.55, y1), (x - 0.55, y1))
    if kind == "dots":
        for row, y in enumerate(np.arange(y0 + 1.5, y1, 3.4).tolist()):
            for x in np.arange(x0 + (1.5 if row % 2 else 3.4), x1, 3.8).tolist():
                sketch.ellipse(tint, x, y, 1.0, 1.0)


_BROWS: dict[str, tuple[float, float]] = {  # heights of the inner and the outer end
    "smile": (15.6, 15.8),
    "laughing": (14.9, 15.6),
    "sad": (14.4, 16.8),
    "angry": (17.4, 14.2),
    "surprised": (13.4, 13.6),
}


def _draw_face(sketch: Sketch, who: Identity, expression: str, d: float) -> None:
    skin = world.SKIN_TONES[who.skin]
    sketch.part = SKIN
    sketch.ellipse(skin, 32, 20 + d, 11.2, 10.6)
    sketch.part = EYES
    iris = world.EYE_COLOURS[who.eye_colour]
    wide = 0.5 if expression == "surprised" else 0.0
    for x in (27.0, 37.0):
        sketch.ellipse((252, 252, 252), x, 20.5 + d, 3.5, 3.7 + wide)
        sketch.ellipse(iris, x, 20.8 + d, 2.9, 3.2 + wide)
        sketch.ellipse((16, 12, 22), x, 21 + d, 1.0, 1.3)
        sketch.ellipse((255, 255, 255), x + 1.1, 19.3 + d, 0.7, 0.7)
    sketch.part = NOTHING
    inner, outer = _BROWS[expression]
    for side in (-1, 1):
        ends = (32 + side * 2.6, inner + d), (32 + side * 8, outer + d)
        sketch.line(OUTLINE, 1.3, *ends)
    _draw_mouth(sketch, expression, d)


def _draw_mouth(sketch: Sketch, expression: str, d: float) -> None:
    if expression == "smile":
        sketch.line(OUTLINE, 1.1, (28.4, 25.8 + d), (30.2, 27.4 + d), (33.8, 27.4 + d),
                    (35.6, 25.8 + d))  # fmt: skip
    elif expression == "laughing":
        sketch.polygon(
            (200, 30, 50), (27.6, 25.2 + d), (36.4, 25.2 + d), (34.6, 29 + d), (32, 29.8 + d),
            (29.4, 29 + d),
        )  # fmt: skip
        sketch.polygon((255, 255, 255), (28.4, 25.2 + d), (35.6, 25.2 + d), (35.2, 26.4 + d),
                       (28.8, 26.4 + d))  # fmt: skip
    elif expression == "sad":
        sketch.line(OUTLINE, 1.1, (28.8, 28 + d), (30.4, 26.5 + d), (33.6, 26.5 + d),
                    (35.2, 28 + d))  # fmt: skip
    elif expression == "angry":
        sketch.line(OUTLINE, 1.6, (28.6, 27.2 + d), (35.4, 27.2 + d))
    else:
        sketch.ellipse((120, 20, 36), 32, 27.2 + d, 2.0, 2.4)


def _draw_hair_behind(sketch: Sketch, style: str, colour: Colour, d: float) -> None:
    if style == "bob":
        sketch.ellipse(colour, 32, 21 + d, 14.6, 12.5)
    elif style == "long hair":
        sketch.ellipse(colour, 32, 18 + d, 13.8, 13)
        sketch.polygon(colour, (18.3, 18 + d), (45.7, 18 + d), (47.5, 49 + d), (16.5, 49 + d))
    elif style == "twintails":
        for side in (-1, 1):
            sketch.ellipse(colour, 32 + side * 18.5, 27 + d, 5.2, 11.5)
            sketch.ellipse(colour, 32 + side * 14, 15 + d, 3.4, 3.4)
    elif style == "side ponytail":
        sketch.ellipse(colour, 46, 11 + d, 4, 4)
        sketch.polygon(
            colour, (43, 10 + d), (50, 7 + d), (57, 15 + d), (57, 34 + d), (53, 41 + d),
            (49, 33 + d), (49, 20 + d),
        )  # fmt: skip
    elif style == "afro":
        sketch.ellipse(colour, 32, 16.5 + d, 18.5, 15.5)
    elif style == "spiky hair":
        star = []
        for i, angle in enumerate(np.linspace(-200, 20, 15).tolist()):
            radius = 18.5 if i % 2 else 12.0
            x = 32 + radius * math.cos(math.radians(angle))
            star.append((x, 19 + 0.92 * radius * math.sin(math.radians(angle)) + d))
        sketch.polygon(colour, *star)


def _make_cap(low: float, fringe: tuple[float, ...]) -> tuple[Point, ...]:
    """Hair on top of the head: a dome down to y = `low` at the sides, and the fringe's heights."""
    dome = [
        (32 + 13 * math.cos(math.radians(a)), 18.5 + 13 * math.sin(math.radians(a)))
        for a in range(-180, 1, 12)
    ]
    width = 22.0 / (len(fringe) - 1)
    edge = [(43 - width * i, y) for i, y in enumerate(fringe)]
    return (*dome, (45, low), (43, low), *edge, (21, low), (19, low))


_CAPS: dict[str, tuple[float, tuple[float, ...]]] = {
    "bob": (29.5, (16, 15.2, 15.2, 15.2, 15.2, 16)),
    "long hair": (31.0, (17, 13, 10, 13, 17)),
    "twintails": (21.0, (17, 13.5, 16, 13.5, 17)),
    "side ponytail": (21.0, (12, 12, 13, 14.5, 16.5, 18)),
    "spiky hair": (18.0, (12, 16.5, 12, 16.5, 12, 16.5, 12)),
    "double buns": (20.0, (16, 11.5, 9.5, 11.5, 16)),
    "afro": (19.0, (13, 12, 11.5, 12, 13)),
}


def _draw_hair_front(sketch: Sketch, style: str, colour: Colour, d: float) -> None:
    if style == "mohawk":
        sketch.polygon(
            colour, (29, 14 + d), (27.5, 6 + d), (26.5, 2 + d), (30, 4 + d), (32, 0.5 + d),
            (34, 4 + d), (37.5, 2 + d), (36.5, 6 + d), (35, 14 + d),
        )  # fmt: skip
        return
    if style == "double buns":
        for x in (20, 44):
            sketch.ellipse(colour, x, 7.5 + d, 5.6, 5.6)
    low, fringe = _CAPS[style]
    sketch.polygon(colour, *((x, y + d) for x, y in _make_cap(low, fringe)))
