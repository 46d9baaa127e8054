"""Reference preparation: every kind of file is handled or refused in one sentence."""

import math
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from refusal import sentence

from retrieval_core.bank.encoding import select_tokens
from retrieval_core.data.prepare import (
    fill_background,
    fit_mask,
    load_image,
    pad_to_square,
    prepare,
)

GREY = (127, 127, 127)


def box_of(inside):
    """The box (x0, y0, x1, y1) of a square's content."""
    rows, columns = np.nonzero(inside)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def picture(height=5, width=7):
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)


# Files that are refused


def test_missing_file(tmp_path):
    message = sentence(load_image, tmp_path / "nowhere.png")
    assert "There is no file" in message and "nowhere.png" in message


def test_folder(tmp_path):
    assert "is a folder" in sentence(load_image, tmp_path)


def test_name_with_null_character():
    assert "cannot be read" in sentence(load_image, "face\0.png")


@pytest.mark.parametrize("data", [b"", b"this is text, not an image", b"\x00" * 100])
def test_not_an_image(tmp_path, data):
    path = tmp_path / "face.png"
    path.write_bytes(data)
    assert "is not an image" in sentence(load_image, path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated(tmp_path, format):
    path = tmp_path / "whole"
    Image.fromarray(picture(60, 60)).save(path, format)
    data = path.read_bytes()
    for kept in (len(data) // 2, len(data) - len(data) // 4):
        cut = tmp_path / "cut"
        cut.write_bytes(data[:kept])
        message = sentence(load_image, cut)
        assert "damaged or truncated" in message or "is not an image" in message


def png(width, height, bits, rows):
    """A PNG file of RGB colours; Pillow cannot write 16 bits of them, nor a lie in the header."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("edge", [10_000, 60_000])
@pytest.mark.parametrize("checked_by_pillow", [True, False])
def test_decompression_bomb(tmp_path, edge, checked_by_pillow, monkeypatch):
    if not checked_by_pillow:  # many packs of the host do this
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = tmp_path / "bomb.png"
    path.write_bytes(png(edge, edge, 8, b"\0"))
    message = sentence(load_image, path)
    assert "scale it down" in message and ("pixels" in message)


def test_transparent_throughout(tmp_path):
    path = tmp_path / "nothing.png"
    Image.new("RGBA", (4, 4), (200, 10, 10, 0)).save(path)
    assert "transparent throughout" in sentence(load_image, path)


# Files that are handled


def test_plain_image_is_unchanged(tmp_path):
    path = tmp_path / "face.png"
    Image.fromarray(picture()).save(path)
    image, mask = load_image(str(path))
    assert image.dtype == np.uint8 and mask is None
    np.testing.assert_array_equal(image, picture())


def test_alpha_gives_the_mask_and_grey_behind(tmp_path):
    path = tmp_path / "face.png"
    alpha = np.array([[255, 0], [0, 51]], np.uint8)
    pixels = np.full((2, 2, 3), 227, np.uint8)
    Image.fromarray(np.dstack([pixels, alpha])).save(path)
    image, mask = load_image(path)
    np.testing.assert_allclose(mask, [[1, 0], [0, 0.2]], atol=1e-6)
    np.testing.assert_array_equal(image[..., 0], [[227, 127], [127, 147]])


def test_opaque_alpha_gives_no_mask(tmp_path):
    path = tmp_path / "face.png"
    Image.fromarray(picture()).convert("RGBA").save(path)
    image, mask = load_image(path)
    assert mask is None
    np.testing.assert_array_equal(image, picture())


def test_palette_with_a_transparent_colour(tmp_path):
    path = tmp_path / "face.gif"
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1, 1])
    image.save(path, transparency=0)
    pixels, mask = load_image(path)
    np.testing.assert_array_equal(pixels[0], [GREY, (200, 100, 50), (200, 100, 50)])
    np.testing.assert_array_equal(mask[0], [0, 1, 1])


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette(tmp_path, mode):
    path = tmp_path / "face.png"
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode).save(path)
    image, mask = load_image(path)
    assert mask is None
    np.testing.assert_array_equal(image, [[[0] * 3, [255] * 3]])


def test_grey_with_alpha(tmp_path):
    path = tmp_path / "face.png"
    Image.merge("LA", (Image.new("L", (2, 2), 90), Image.new("L", (2, 2), 102))).save(path)
    image, mask = load_image(path)
    np.testing.assert_allclose(mask, 0.4, atol=1e-6)
    assert (image == round(0.4 * 90 + 0.6 * 127)).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_greys_are_scaled_not_clipped(tmp_path, format):
    path = tmp_path / "face"
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(path, format)
    image, mask = load_image(path)
    assert mask is None
    np.testing.assert_array_equal(image[0, :, 0], [0, 100, 255])


def test_sixteen_bit_dark_image_stays_dark(tmp_path):
    path = tmp_path / "face.png"
    Image.fromarray(np.full((2, 2), 200, np.uint16)).save(path)
    assert load_image(path)[0].max() == 1


def test_sixteen_bit_colour(tmp_path):
    path = tmp_path / "face.png"
    row = b"\0" + struct.pack(">6H", 65535, 0, 257 * 7, 0, 257 * 9, 65535)
    path.write_bytes(png(2, 1, 16, row))
    np.testing.assert_array_equal(load_image(path)[0], [[[255, 0, 7], [0, 9, 255]]])


def test_floating_point_greys(tmp_path):
    path = tmp_path / "face.tiff"
    Image.fromarray(np.array([[0, 0.2, 1]], np.float32)).save(path)
    np.testing.assert_array_equal(load_image(path)[0][0, :, 1], [0, 51, 255])


def test_cmyk(tmp_path):
    path = tmp_path / "face.tiff"
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(path)
    np.testing.assert_array_equal(load_image(path)[0][0, 0], (255, 0, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = picture(4, 6)
    undo = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "face.png"
    Image.fromarray(np.ascontiguousarray(undo)).save(path, exif=exif)
    np.testing.assert_array_equal(load_image(path)[0], upright)


def test_exif_rotation_turns_the_mask_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = Image.new("RGBA", (2, 1), (9, 9, 9, 255))
    rgba.putpixel((0, 0), (9, 9, 9, 0))
    rgba.save(tmp_path / "face.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "face.png")[1], [[0], [1]])


@pytest.mark.parametrize("width, height", [(1, 1), (10_000, 3), (3, 10_000), (1, 5000)])
def test_extreme_sizes(tmp_path, width, height):
    path = tmp_path / "thin.png"
    Image.new("RGB", (width, height), (200, 30, 60)).save(path)
    image, mask = load_image(path)
    assert image.shape == (height, width, 3)
    square, inside = pad_to_square(image, mask, 64)
    x0, y0, x1, y1 = box_of(inside)
    assert square.shape == (64, 64, 3) and max(x1 - x0, y1 - y0) == 64
    assert min(x1 - x0, y1 - y0) == (64 if width == height else 1)
    assert (square[inside > 0] == (200, 30, 60)).all() and (square[inside == 0] == GREY).all()
    assert inside.sum() == (x1 - x0) * (y1 - y0)


# Padding, masks


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 33))
@hypothesis_settings(max_examples=60, deadline=None)
def test_padding_never_squashes(height, width, size):
    square, inside = pad_to_square(np.full((height, width, 3), 250, np.uint8), None, size)
    x0, y0, x1, y1 = box_of(inside)
    longer, shorter = max(height, width), min(height, width)
    assert max(x1 - x0, y1 - y0) == size
    assert abs(min(x1 - x0, y1 - y0) - size * shorter / longer) < 2
    assert (square[y0:y1, x0:x1] == 250).all()
    assert (square[inside == 0] == GREY).all()
    assert abs((x0 + x1) - size) <= 1 and abs((y0 + y1) - size) <= 1


def test_same_size_square_is_copied_exactly():
    image = picture(16, 16)
    square, inside = pad_to_square(image, None, 16)
    np.testing.assert_array_equal(square, image)
    assert inside.all()


def test_padded_mask_keeps_a_thin_selection():
    mask = np.zeros((500, 250), np.float32)
    mask[123, 45] = 1
    _, inside = pad_to_square(picture(500, 250), mask, 16)
    # The content is 8 pixels wide, with 4 of padding on each side.
    assert inside[123 * 16 // 500, 4 + 45 * 16 // 500] > 0 and (inside > 0).sum() == 1


@pytest.mark.parametrize("size", [0, -3])
def test_size_below_one(size):
    assert f"{size} pixels" in sentence(prepare, picture(), size=size)


def test_fill_background():
    mask = np.array([[1, 0], [0.5, 1]], np.float32)
    filled = fill_background(np.full((2, 2, 3), 27, np.uint8), mask)
    np.testing.assert_array_equal(filled[0], [(27, 27, 27), GREY])
    assert abs(int(filled[1, 0, 0]) - 77) <= 1


def test_mask_of_another_size_is_resized_as_the_host_does():
    mask = np.zeros((4, 4), np.float32)
    mask[:, 2:] = 1
    resized = fit_mask(mask, 8, 6)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(mask)[None, None], (8, 6), mode="bilinear", align_corners=False
    )
    np.testing.assert_array_equal(resized, expected[0, 0].numpy())


@pytest.mark.parametrize("dtype, selected", [(bool, 1), (np.uint8, 1), (np.uint8, 255), (float, 1)])
def test_mask_types(dtype, selected):
    mask = np.zeros((3, 3), dtype)
    mask[1, 1] = selected
    np.testing.assert_array_equal(fit_mask(mask, 3, 3), mask.astype(bool))
    np.testing.assert_array_equal(fit_mask(torch.from_numpy(mask)[None], 3, 3), mask.astype(bool))


@pytest.mark.parametrize("mask", [np.zeros((6, 4)), np.zeros((6, 4), bool), -np.ones((6, 4))])
def test_empty_mask(mask):
    assert "The mask is empty (none of its 4 x 6 pixels" in sentence(fit_mask, mask, 10, 10)
    assert "The mask is empty" in sentence(prepare, picture(), mask)


def test_small_selection_survives_resizing():
    mask = np.zeros((640, 640), np.float32)
    mask[7, 7] = 1
    assert fit_mask(mask, 8, 8)[0, 0] > 0


def test_mask_with_nan_or_wrong_shape():
    assert "1 NaN" in sentence(fit_mask, np.array([[math.nan, 1]]), 2, 2)
    assert "[2, 3, 4]" in sentence(fit_mask, np.ones((2, 3, 4)), 3, 4)
    assert "[0, 4]" in sentence(fit_mask, np.ones((0, 4)), 3, 4)


@given(st.integers(1, 23), st.integers(1, 23), st.integers(1, 12), st.integers(1, 12), st.data())
@hypothesis_settings(max_examples=80, deadline=None)
def test_token_is_left_out_only_if_wholly_outside(rows, columns, height, width, data):
    bits = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    mask = np.array(bits).reshape(rows, columns)
    kept = select_tokens(torch.from_numpy(mask), height, width)
    assert kept.dtype == torch.bool and kept.shape == (height, width)
    for i in range(height):
        for j in range(width):
            touched = mask[
                i * rows // height : -(-(i + 1) * rows // height),
                j * columns // width : -(-(j + 1) * columns // width),
            ]
            assert bool(kept[i, j]) == touched.any()


def test_token_mask_of_soft_values():
    mask = torch.zeros(8, 8)
    mask[0, 0] = 0.01
    assert select_tokens(mask, 2, 2).tolist() == [[True, False], [False, False]]


# The whole line


def test_prepare_without_mask():
    reference = prepare(picture(16, 16), size=16, concept="face", weight=2)
    assert reference.image.dtype == torch.float32 and reference.image.shape == (3, 16, 16)
    assert reference.mask is None and reference.concept == "face" and reference.weight == 2.0
    np.testing.assert_array_equal(
        (reference.image * 255).round().permute(1, 2, 0).byte().numpy(), picture(16, 16)
    )


def test_prepare_masks_the_padding():
    reference = prepare(picture(10, 20), size=20)
    assert reference.mask is not None and reference.mask.sum() == 200
    assert reference.mask[0].sum() == 0 and reference.mask[10].all()


def test_prepare_lets_no_background_through():
    image = np.full((40, 40, 3), (255, 0, 0), np.uint8)
    image[10:30, 10:30] = (0, 0, 255)
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    reference = prepare(image, mask, size=17)
    red, green, blue = reference.image
    # Between grey and blue, red is never above green; any background would lift it.
    assert (red <= green + 2 / 255).all() and blue.max() > 0.9
    outside = reference.mask == 0
    torch.testing.assert_close(
        reference.image[:, 0, 0], torch.full((3,), 127 / 255), atol=1e-6, rtol=0
    )
    assert outside.any() and not outside.all()


def test_prepare_takes_the_hosts_images():
    image = torch.rand(9, 9, 3)
    mask = torch.ones(1, 4, 4)
    reference = prepare(image, mask, size=9)
    assert (reference.image.permute(1, 2, 0) - image).abs().max() <= 0.5 / 255 + 1e-6


def test_prepare_does_not_change_what_it_is_given():
    image, mask = picture(6, 6), np.eye(6, dtype=np.float32)
    before, mask_before = image.copy(), mask.copy()
    prepare(image, mask, size=6)
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(mask, mask_before)


@pytest.mark.parametrize(
    "image, shown",
    [
        (np.zeros((4, 4), np.uint8), "[4, 4]"),
        (np.zeros((4, 4, 4), np.uint8), "[4, 4, 4]"),
        (np.zeros((0, 4, 3), np.uint8), "[0, 4, 3]"),
        (np.full((2, 2, 3), math.nan), "nan"),
        (np.full((2, 2, 3), 7, np.int64), "int64"),
    ],
)
def test_refused_arrays(image, shown):
    assert shown in sentence(prepare, image)


@pytest.mark.parametrize("weight", [math.nan, -1.0, math.inf])
def test_prepare_refuses_weights(weight):
    assert str(weight) in sentence(prepare, picture(), weight=weight)
