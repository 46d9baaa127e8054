"""The paper-doll world: its truth is what its pictures show."""

import hashlib
import math
import os
import subprocess
import sys
from dataclasses import astuple, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from retrieval_core.data.concepts import LOWEST_HEAD_BORDER
from retrieval_core.paperdoll import draw
from retrieval_core.paperdoll.backgrounds import draw_background
from retrieval_core.paperdoll.draw import SCALE, STANCES, render
from retrieval_core.paperdoll.world import (
    BACKGROUND_VARIANTS,
    BACKGROUNDS,
    EXPRESSIONS,
    EYE_COLOURS,
    GARMENT_COLOURS,
    HAIR_COLOURS,
    HAIR_STYLES,
    LOWER_KINDS,
    PATTERNS,
    POSES,
    SIZE,
    SKIN_TONES,
    UPPER_KINDS,
    Figure,
    Identity,
    Outfit,
    Scene,
    is_held_out,
    random_identity,
    random_outfit,
    random_scene,
)

ROOT = Path(__file__).resolve().parents[2]
IDENTITIES = [
    Identity(*values) for values in product(HAIR_STYLES, HAIR_COLOURS, EYE_COLOURS, SKIN_TONES)
]
OUTFITS = [
    Outfit(*values)
    for values in product(UPPER_KINDS, GARMENT_COLOURS, PATTERNS, LOWER_KINDS, GARMENT_COLOURS)
    if values[1] != values[4]
]
VALUES = {
    ("identity", "hair_style"): HAIR_STYLES,
    ("identity", "hair_colour"): HAIR_COLOURS,
    ("identity", "eye_colour"): EYE_COLOURS,
    ("identity", "skin"): SKIN_TONES,
    ("outfit", "upper"): UPPER_KINDS,
    ("outfit", "upper_colour"): GARMENT_COLOURS,
    ("outfit", "upper_pattern"): PATTERNS,
    ("outfit", "lower"): LOWER_KINDS,
    ("outfit", "lower_colour"): GARMENT_COLOURS,
    ("scene", "pose"): POSES,
    ("scene", "expression"): EXPRESSIONS,
}


def figures(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Figure(random_identity(rng), random_outfit(rng), random_scene(rng)) for _ in range(count)
    ]


def pixels(rendering):
    return rendering.image.astype(int)


def grown(mask):
    """The mask and the pixels that touch it."""
    padded = np.pad(mask, 1)
    return np.any([padded[y : y + SIZE, x : x + SIZE] for y in range(3) for x in range(3)], axis=0)


def head(rendering):
    x0, y0, x1, y1 = rendering.head_box
    box = np.zeros((SIZE, SIZE), bool)
    box[y0:y1, x0:x1] = True
    return box


# What there is


def test_there_is_as_much_as_was_asked_for():
    assert len(HAIR_STYLES) * len(HAIR_COLOURS) >= 40
    assert len(UPPER_KINDS) + len(LOWER_KINDS) >= 10
    assert len(GARMENT_COLOURS) >= 8 and len(PATTERNS) >= 4
    assert len(EYE_COLOURS) >= 6 and len(SKIN_TONES) >= 4
    assert len(POSES) >= 8 and len(EXPRESSIONS) >= 5 and len(BACKGROUNDS) >= 8
    assert set(STANCES) == set(POSES)


def test_names_are_tags():
    names = [*HAIR_STYLES, *HAIR_COLOURS, *EYE_COLOURS, *SKIN_TONES, *UPPER_KINDS, *LOWER_KINDS]
    names += [*GARMENT_COLOURS, *PATTERNS, *POSES, *EXPRESSIONS, *BACKGROUNDS]
    assert all(name == name.lower().strip() and "," not in name for name in names)
    said = [*POSES, *EXPRESSIONS, *BACKGROUNDS]
    assert len(set(said)) == len(said)


def test_tags_say_the_scene_and_nothing_of_who_or_what():
    for figure in figures(50):
        scene = figure.scene
        assert scene.tags() == [scene.pose, scene.expression, scene.background]


@pytest.mark.parametrize("colours", [HAIR_COLOURS, EYE_COLOURS, SKIN_TONES, GARMENT_COLOURS])
def test_colours_can_be_told_apart(colours):
    values = list(colours.values())
    assert all(math.dist(a, b) > 40 for i, a in enumerate(values) for b in values[:i])


# Who is held out


def test_the_split_is_a_fifth_and_never_changes():
    assert sum(map(is_held_out, IDENTITIES)) == 328  # of 1536
    assert sum(map(is_held_out, OUTFITS)) == 1346  # of 6720
    assert 0.17 < 328 / len(IDENTITIES) < 0.23 and 0.17 < 1346 / len(OUTFITS) < 0.23


@pytest.mark.parametrize(
    ("values", "held_out"),
    [
        (("bob", "black", "blue", "pale"), False),
        (("bob", "blonde", "red", "pale"), True),
        (("bob", "green", "purple", "pale"), False),
        (("bob", "white", "red", "pale"), True),
    ],
)
def test_a_few_identities_stay_where_they_are(values, held_out):
    assert is_held_out(Identity(*values)) is held_out


def test_the_split_is_by_the_names_alone():
    who, clothes = IDENTITIES[700], OUTFITS[3000]
    for kind, value, found in (
        ("identity", who, is_held_out(who)),
        ("outfit", clothes, is_held_out(clothes)),
    ):
        digest = hashlib.sha256("|".join((kind, *astuple(value))).encode()).hexdigest()
        assert found == (int(digest[:8], 16) % 100 < 20)


def test_every_single_value_is_seen_in_training_and_held_out():
    """What is held out are combinations: each hair style, colour, ... must be learnable."""
    split = {
        name: [[w for w in world if test(w) is side] for side in (False, True)]
        for name, world, test in (
            ("identity", IDENTITIES, is_held_out),
            ("outfit", OUTFITS, is_held_out),
        )
    }
    for (part, name), values in VALUES.items():
        for side in split.get(part, []):
            assert {getattr(one, name) for one in side} == set(values)


@pytest.mark.parametrize("held_out", [True, False])
def test_draws_keep_to_their_side_of_the_split(held_out):
    rng = np.random.default_rng(3)
    assert all(is_held_out(random_identity(rng, held_out)) is held_out for _ in range(200))
    assert all(is_held_out(random_outfit(rng, held_out)) is held_out for _ in range(200))


def test_draws_are_even_and_colours_of_an_outfit_differ():
    rng = np.random.default_rng(4)
    people = [random_identity(rng) for _ in range(3000)]
    clothes = [random_outfit(rng) for _ in range(3000)]
    scenes = [random_scene(rng) for _ in range(3000)]
    assert all(outfit.upper_colour != outfit.lower_colour for outfit in clothes)
    drawn = {"identity": people, "outfit": clothes, "scene": scenes}
    wanted = {**VALUES, ("scene", "background"): BACKGROUNDS}
    del wanted["outfit", "upper_pattern"]  # half of them plain, on purpose
    for (part, name), values in wanted.items():
        shares = [np.mean([getattr(one, name) == value for one in drawn[part]]) for value in values]
        assert max(abs(share * len(values) - 1) for share in shares) < 0.25, name
    assert 0.45 < np.mean([outfit.upper_pattern == "plain" for outfit in clothes]) < 0.55
    assert 0.45 < np.mean([scene.mirror for scene in scenes]) < 0.55
    assert {scene.shift for scene in scenes} == set(product(range(-2, 3), repeat=2))
    assert {scene.background_seed for scene in scenes} == set(range(BACKGROUND_VARIANTS))


def test_a_seed_gives_the_same_figures():
    assert figures(20, 7) == figures(20, 7) != figures(20, 8)


# Pictures


def digest():
    """Of pictures, masks and head boxes of some figures, and of their draw."""
    found = hashlib.sha256()
    for figure in figures(12, 5):
        drawn = render(figure)
        found.update(repr((figure, drawn.head_box)).encode())
        found.update(drawn.image.tobytes() + drawn.mask.tobytes())
    return found.hexdigest()


def test_a_fresh_process_draws_the_same():
    code = "import test_paperdoll_world as t; print(t.digest())"
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    variables = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "123"}
    output = subprocess.check_output([sys.executable, "-c", code], env=variables, text=True)
    assert output.strip() == digest()


def test_a_rendering_has_the_promised_types():
    figure = figures(1)[0]
    drawn = render(figure)
    assert drawn.figure is figure
    assert drawn.image.shape == (SIZE, SIZE, 3) and drawn.image.dtype == np.uint8
    assert drawn.mask.shape == (SIZE, SIZE) and drawn.mask.dtype == np.bool_
    x0, y0, x1, y1 = drawn.head_box
    assert 0 <= x0 < x1 <= SIZE and 0 <= y0 < y1 <= SIZE


def test_drawing_one_figure_does_not_change_the_next():
    one, two = figures(2)
    two = replace(two, scene=replace(two.scene, background=one.scene.background))
    before = render(one).image
    render(two)
    assert np.array_equal(render(one).image, before)


@pytest.mark.parametrize("index", range(10))
def test_the_mask_is_what_covers_half_a_pixel_of_any_background(index):
    """A pixel covered by c of the figure shows (1 - c) of the difference of two backgrounds."""
    figure = figures(10, 11)[index]
    scenes = [replace(figure.scene, background=name) for name in ("night", "studio")]
    night, studio = (render(replace(figure, scene=scene)) for scene in scenes)
    assert np.array_equal(night.mask, studio.mask)
    behind = [
        np.asarray(draw_background(scene.background, scene.background_seed)).astype(int)
        for scene in scenes
    ]
    difference = behind[1] - behind[0]
    channel = np.abs(difference).argmax(2)[..., None]
    most = np.take_along_axis(difference, channel, 2)[..., 0]
    seen = np.take_along_axis(pixels(studio) - pixels(night), channel, 2)[..., 0]
    told = np.abs(most) > 60
    cover = 1 - seen / np.where(told, most, 1)
    assert told.mean() > 0.95
    assert np.array_equal(night.mask[told], cover[told] > 0.5)
    outside = ~grown(night.mask)
    assert outside.mean() > 0.3
    for drawn, plain in zip((night, studio), behind):
        assert np.array_equal(pixels(drawn)[outside], plain[outside])


@pytest.mark.parametrize(("part", "name"), VALUES)
def test_every_change_of_truth_shows_inside_the_figure_and_nowhere_else(part, name):
    for figure in figures(8, 13):
        before = render(figure)
        truth = getattr(figure, part)
        for value in VALUES[part, name]:
            if value == getattr(truth, name):
                continue
            after = render(replace(figure, **{part: replace(truth, **{name: value})}))
            changed = np.abs(pixels(after) - pixels(before)).max(2)
            covered = before.mask | after.mask
            # Least of all: a pattern on the little of a tank top that overalls leave free.
            assert (changed[covered] > 20).sum() >= (4 if name == "upper_pattern" else 20)
            assert not changed[~grown(covered)].any()


def test_eyes_and_expressions_change_the_head_box_only():
    for figure in figures(40, 17):
        before = render(figure)
        changes = [
            replace(figure, identity=replace(figure.identity, eye_colour=eyes))
            for eyes in EYE_COLOURS
            if eyes != figure.identity.eye_colour
        ]
        changes += [
            replace(figure, scene=replace(figure.scene, expression=expression))
            for expression in EXPRESSIONS
            if expression != figure.scene.expression
        ]
        for change in changes:
            changed = (pixels(render(change)) != pixels(before)).any(2)
            assert changed.any() and not changed[~head(before)].any()


def test_the_head_box_fits_the_head():
    """Bald but for a mohawk, only the face has the skin's colour there; it fills the box."""
    for pose, mirror, shift in product(POSES, (False, True), ((-2, -2), (2, 2))):
        scene = Scene(pose, "smile", "night", mirror, shift, 0)
        who = Identity("mohawk", "black", "blue", "pale")
        drawn = render(Figure(who, OUTFITS[0], scene))
        x0, y0, x1, y1 = drawn.head_box
        skin = np.abs(pixels(drawn) - SKIN_TONES["pale"]).max(2) < 8
        rows, columns = np.nonzero(skin & head(drawn))
        assert x0 <= columns.min() <= x0 + 7 and x1 - 8 <= columns.max() < x1
        # Above the face there is room for the hair, below it a pixel or two of neck.
        assert rows.max() - rows.min() >= 0.6 * (y1 - y0)
        assert 20 <= x1 - x0 <= 30 and 20 <= y1 - y0 <= 30


def test_heads_are_up_but_in_a_handstand():
    for figure in figures(100, 19):
        low = render(figure).head_box[3] > LOWEST_HEAD_BORDER * SIZE
        assert low == (figure.scene.pose == "handstand")
    for shift in product((-2, 2), repeat=2):
        scene = Scene("handstand", "smile", "sky", shift=shift)
        assert render(Figure(IDENTITIES[0], OUTFITS[0], scene)).head_box[3] > 0.75 * SIZE


def share_cut_off(figure):
    """How much of the figure's area lies beyond the canvas."""
    margin = 10 * SCALE
    sketch, stance = draw.Sketch(), STANCES[figure.scene.pose]
    draw._draw_figure(sketch, figure, stance)
    canvas = Image.new("L", (SIZE * SCALE + 2 * margin,) * 2)
    pen = ImageDraw.Draw(canvas)
    for kind, points, width, *_ in draw._place(sketch, figure, stance):
        moved = [(x + margin, y + margin) for x, y in points]
        draw._stroke(pen, kind, moved, width, 255, 2.0)
    covered = np.asarray(canvas) > 0
    return 1 - covered[margin:-margin, margin:-margin].sum() / covered.sum()


def test_figures_are_inside_the_canvas():
    """The highest hair loses its tips in a jump; all else is whole but for a few pixels."""
    for pose, style, mirror in product(POSES, HAIR_STYLES, (False, True)):
        for shift in ((-2, -2), (2, 2)):
            scene = Scene(pose, "smile", "studio", mirror, shift)
            outfit = Outfit("poncho", "red", "plain", "long skirt", "blue")
            figure = Figure(Identity(style, "red", "blue", "tan"), outfit, scene)
            assert share_cut_off(figure) < (0.04 if pose == "jumping" else 0.01)
            for x, y in [*STANCES[pose].hands, *STANCES[pose].feet]:
                moved = draw._make_mover(figure, STANCES[pose])((x, y))
                assert all(2 <= coordinate <= SIZE - 1 for coordinate in moved)


def test_mirror_and_shift_move_the_figure():
    for figure in figures(20, 23):
        plain = replace(figure.scene, mirror=False, shift=(0, 0))
        still, turned, right, down = (
            render(replace(figure, scene=replace(plain, **change))).mask
            for change in ({}, {"mirror": True}, {"shift": (2, 0)}, {"shift": (0, 2)})
        )
        assert (turned == still[:, ::-1]).mean() > 0.97
        assert np.array_equal(right[:, 2:-2], still[:, :-4])
        assert (down[1:] == still[:-1]).mean() > 0.99


# Backgrounds


def test_backgrounds_can_be_told_apart_and_have_variants():
    means = {}
    for name in BACKGROUNDS:
        variants = [np.asarray(draw_background(name, seed)).astype(int) for seed in range(8)]
        assert all(v.shape == (SIZE, SIZE, 3) for v in variants)
        assert sum(not np.array_equal(variants[0], v) for v in variants[1:]) >= 5
        means[name] = np.mean(variants, 0)
    names = list(means)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert np.abs(means[a] - means[b]).mean() > 12, (a, b)


def test_truth_is_compared_by_value():
    assert figures(1, 3)[0] == figures(1, 3)[0] and len({*figures(3, 3), *figures(3, 3)}) == 3
