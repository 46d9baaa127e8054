"""Cutting concepts out of pictures: geometry, padding, masks, and the edge cases of §3.3."""

import numpy as np
import pytest

from retrieval_core.data import NEUTRAL, Sample, View, cut_reference
from retrieval_core.data.concepts import LOWEST_HEAD_BORDER, find_face_region
from retrieval_core.data.placing import Region, place_mask, place_picture, place_region
from retrieval_core.data.prepare import prepare
from retrieval_core.errors import RetrievalError

HEAD, BODY, GROUND, FILL = (250, 10, 20), (10, 240, 30), (15, 25, 235), (200, 201, 5)


def figure(height=64, width=64, head=(20, 4, 40, 24), body=(16, 24, 44, 60)):
    """Flat colours for head, body and background; the mask is head and body."""
    image = np.empty((height, width, 3), np.uint8)
    image[:] = GROUND
    mask = np.zeros((height, width), bool)
    for (x0, y0, x1, y1), colour in ((body, BODY), (head, HEAD)):
        image[y0:y1, x0:x1] = colour
        mask[y0:y1, x0:x1] = True
    return Sample(image, mask, head)


def colours(pixels):
    return {tuple(int(v) for v in colour) for colour in pixels.reshape(-1, 3)}


def where(image, colour):
    return (image == np.array(colour, np.uint8)).all(-1)


def test_a_figure_of_the_right_size_is_copied_exactly():
    sample = figure()
    taken = cut_reference(sample, "figure", 64)
    assert np.array_equal(taken.image, sample.image)
    assert taken.mask is None and taken.concept == "figure"
    assert not np.shares_memory(taken.image, sample.image)


def test_background_removal_fills_and_gives_the_mask():
    sample = figure()
    taken = cut_reference(sample, "figure", 64, FILL, remove_background=True)
    assert np.array_equal(taken.mask, sample.mask)
    assert np.array_equal(where(taken.image, FILL), ~sample.mask)
    assert colours(taken.image) == {HEAD, BODY, FILL}
    assert colours(sample.image) == {HEAD, BODY, GROUND}  # the sample itself is untouched


def test_removing_an_unknown_or_empty_background_keeps_the_picture():
    sample = figure()
    for mask in (None, np.zeros((64, 64), bool)):
        taken = cut_reference(Sample(sample.image, mask), "figure", 64, remove_background=True)
        assert taken.mask is None
        assert np.array_equal(taken.image, sample.image)


@pytest.mark.parametrize(("height", "width"), [(100, 40), (40, 100), (37, 64), (300, 211)])
def test_padding_is_even_and_nothing_is_squashed(height, width):
    image = np.empty((height, width, 3), np.uint8)
    image[:] = BODY
    taken = cut_reference(Sample(image), "figure", 64, FILL).image
    inside = where(taken, BODY)
    assert np.array_equal(~inside, where(taken, FILL))  # no blended pixel at the border
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert inside.sum() == len(rows) * len(columns)
    shares = (len(rows) / 64, len(columns) / 64)
    longer = max(height, width)
    assert shares[0] == pytest.approx(height / longer, abs=2 / 64)
    assert shares[1] == pytest.approx(width / longer, abs=2 / 64)
    for positions in (rows, columns):
        assert abs(positions[0] - (63 - positions[-1])) <= 1


def test_a_circle_stays_a_circle():
    y, x = np.mgrid[:90, :200]
    disc = (x - 100) ** 2 + (y - 45) ** 2 < 40**2
    sample = Sample(np.repeat(disc[..., None], 3, 2).astype(np.uint8) * 255)
    taken = cut_reference(sample, "figure", 64, (0, 0, 0)).image[..., 0] > 127
    assert abs(int(taken.any(0).sum()) - int(taken.any(1).sum())) <= 1


def test_a_face_fills_the_square():
    taken = cut_reference(figure(), "face", 64, FILL)
    assert colours(taken.image) == {HEAD}
    assert taken.concept == "face"


def test_an_oblong_head_box_grows_to_a_square_around_it():
    sample = figure(head=(20, 10, 30, 30))
    region = find_face_region(sample)
    assert region.content == (15, 10, 35, 30)
    taken = cut_reference(sample, "face", 40, FILL).image
    columns = np.flatnonzero((taken[..., 0] > 130).all(0))
    assert (columns[0], columns[-1]) == (10, 29)
    assert FILL not in colours(taken)


@pytest.mark.parametrize(
    ("head", "content"),
    [
        ((0, 0, 10, 30), (0, 0, 30, 30)),  # pushed back inside
        ((60, 34, 64, 64), (34, 34, 64, 64)),
        ((0, 20, 64, 24), (0, 0, 64, 64)),
        ((5, 7, 6, 8), (5, 7, 6, 8)),
    ],
)
def test_faces_at_the_border_are_pushed_back_inside(head, content):
    assert find_face_region(figure(head=head)).content == content


def test_a_face_wider_than_the_picture_is_high_is_padded():
    sample = figure(height=20, width=64, head=(10, 2, 50, 18), body=(0, 18, 64, 20))
    assert find_face_region(sample).content == (10, 0, 50, 20)
    taken = cut_reference(sample, "face", 40, FILL).image
    assert where(taken, FILL)[:10].all() and where(taken, FILL)[30:].all()
    assert not where(taken, FILL)[10:30].any()


@pytest.mark.parametrize("flip", [False, True])
def test_padding_is_masked_as_at_inference(flip):
    wide = figure(height=40, width=64)
    cut = cut_reference(wide, "figure", 64, view=View(shift=(0.1, 0.0), flip=flip))
    grey = (cut.image == 127).all(-1)
    assert cut.mask is not None and np.array_equal(cut.mask, ~grey)
    square = cut_reference(figure(height=40, width=64), "figure", 64)
    inference = prepare(wide.image, size=64)
    assert np.array_equal(square.mask, inference.mask.numpy() > 0)


def test_clothes_are_what_is_below_the_head():
    taken = cut_reference(figure(), "clothes", 64, FILL, remove_background=True)
    assert HEAD not in colours(taken.image)
    assert (taken.image[taken.mask] == np.array(BODY)).mean() > 0.9  # edges are blended
    # 64 x 40 pixels, centred on the square: 12 rows of padding above and below.
    assert where(taken.image, FILL)[:12].all() and where(taken.image, FILL)[52:].all()
    assert not taken.mask[:12].any() and not taken.mask[52:].any()
    assert np.array_equal(taken.mask[12:52], figure().mask[24:])


def upside_down():
    sample = figure()
    return Sample(sample.image[::-1].copy(), sample.mask[::-1].copy(), (20, 40, 40, 60))


@pytest.mark.parametrize("remove_background", [False, True])
def test_upside_down_only_the_head_is_filled(remove_background):
    sample = upside_down()
    assert 60 > LOWEST_HEAD_BORDER * 64
    taken = cut_reference(sample, "clothes", 64, FILL, remove_background=remove_background)
    head = np.zeros((64, 64), bool)
    head[40:60, 20:40] = True
    assert where(taken.image, FILL)[head].all()
    kept = ~head & sample.mask
    assert np.array_equal(taken.image[kept], sample.image[kept])
    if remove_background:
        assert np.array_equal(taken.mask, kept)
    else:
        assert taken.mask is None and GROUND in colours(taken.image)
    assert sample.mask[head].all() and colours(sample.image[head]) == {HEAD}


@pytest.mark.parametrize(("border", "filled"), [(48, False), (49, True), (64, True)])
def test_the_limit_between_cropping_and_filling(border, filled):
    sample = figure(head=(20, 10, 40, border), body=(0, 0, 64, 64))
    taken = cut_reference(sample, "clothes", 64, FILL)
    assert bool(where(taken.image, FILL)[0].all()) is not filled


def test_a_head_that_is_the_whole_picture_leaves_only_padding():
    sample = Sample(np.full((9, 9, 3), 7, np.uint8), np.ones((9, 9), bool), (0, 0, 9, 9))
    taken = cut_reference(sample, "clothes", 16, FILL, remove_background=True)
    assert colours(taken.image) == {FILL}


@pytest.mark.parametrize("size", [1, 7, 64, 96])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 10000), (10000, 3), (2, 5)])
def test_extreme_sizes(height, width, size):
    image = np.full((height, width, 3), 90, np.uint8)
    sample = Sample(image, np.ones((height, width), bool), (0, 0, width, height))
    for concept in ("figure", "face", "clothes"):
        taken = cut_reference(sample, concept, size, FILL)
        assert taken.image.shape == (size, size, 3)
        assert colours(taken.image) <= {(90, 90, 90), FILL}
    assert (90, 90, 90) in colours(cut_reference(sample, "figure", size, FILL).image)


def test_a_view_moves_mirrors_and_zooms_picture_and_mask_alike():
    sample = figure()
    view = View(scale=0.5, shift=(0.125, -0.25), flip=True)
    taken = cut_reference(sample, "figure", 64, FILL, remove_background=True, view=view)
    # Side 32 around (40, 16), so pixels (24..56, 0..32), each twice as large, mirrored.
    expected = np.where(sample.mask[..., None], sample.image, np.array(FILL))[0:32, 24:56][:, ::-1]
    mask = sample.mask[0:32, 24:56][:, ::-1]
    assert np.array_equal(taken.mask, mask.repeat(2, 0).repeat(2, 1))
    middle = taken.image.astype(int).reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(middle - expected).mean() < 4


def test_zooming_out_of_a_face_shows_padding_not_the_body():
    taken = cut_reference(figure(), "face", 64, FILL, view=View(scale=1.6))
    assert colours(taken.image) == {HEAD, FILL}


def test_boxes_follow_the_view():
    for flip in (False, True):
        placement = place_region(Region((0, 0, 40, 80)), 40, View(0.5, (0.1, 0.2), flip))
        # Side 40 around (20 + 8, 40 + 16): pixels (8..48, 36..76), of which 8..40 are picture.
        assert placement.inside == (0, 0, 32, 40)
        box = (10, 40, 20, 50)
        image = np.zeros((80, 40, 3), np.uint8)
        image[40:50, 10:20] = 255
        square = place_picture(image, placement, (0, 0, 0))
        x0, y0, x1, y1 = placement.place_box(box)
        expected = np.zeros((40, 40), bool)
        expected[y0:y1, x0:x1] = True
        assert np.array_equal(square[..., 0] == 255, expected)
        assert np.array_equal(place_mask(image[..., 0] > 0, placement), expected)


def test_what_is_wrong_is_said():
    image = np.zeros((4, 6, 3), np.uint8)
    with pytest.raises(RetrievalError, match="needs the head box"):
        cut_reference(Sample(image), "face", 8)
    with pytest.raises(RetrievalError, match="needs the head box"):
        cut_reference(Sample(image), "clothes", 8)
    with pytest.raises(RetrievalError, match="concept is 'hat'; .* figure, face, clothes"):
        cut_reference(Sample(image), "hat", 8)
    with pytest.raises(RetrievalError, match=r"uint8 \[height, width, 3\]"):
        Sample(image.astype(np.float32))
    with pytest.raises(RetrievalError, match="at least one pixel"):
        Sample(image[:0])
    with pytest.raises(RetrievalError, match=r"must be bool \[4, 6\]"):
        Sample(image, np.zeros((6, 4), bool))
    with pytest.raises(RetrievalError, match="covers nothing of its 6x4"):
        Sample(image, None, (6, 0, 9, 4))
    assert Sample(image, None, (-3, 1, 99, 99)).head_box == (0, 1, 6, 4)
    wide = cut_reference(Sample(np.full((2, 8, 3), 9, np.uint8)), "figure", 8)
    assert wide.image[0, 0].tolist() == [*NEUTRAL]
