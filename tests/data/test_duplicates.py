"""Near-duplicates: what is measured of a picture, and which pictures are copies."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from retrieval_core.data import duplicates
from retrieval_core.data.duplicates import DISTANCE, find_duplicates, look_alike
from retrieval_core.data.pictures import (
    DAMAGED,
    EMPTY,
    MISSING,
    TOO_LARGE,
    TRANSPARENT,
    Measures,
    measure_file,
)
from retrieval_core.data.prepare import load_image
from retrieval_core.data.sources import NOT_A_PICTURE, OUTSIDE
from retrieval_core.paperdoll.draw import render
from retrieval_core.paperdoll.world import (
    GARMENT_COLOURS,
    HAIR_COLOURS,
    Figure,
    random_identity,
    random_outfit,
    random_scene,
)

FIGURES = 40


def draw_figures(count: int = FIGURES) -> list[Figure]:
    rng = np.random.default_rng(3)
    return [
        Figure(random_identity(rng), random_outfit(rng), random_scene(rng)) for _ in range(count)
    ]


def find_copies(pictures: list[bytes], folder) -> np.ndarray:
    measures = []
    for number, content in enumerate(pictures):
        (folder / f"{number}").write_bytes(content)
        measures.append(measure_file(str(folder), f"{number}"))
    return find_duplicates(
        np.array([list(one.hash) for one in measures], np.uint8),
        np.array([list(one.thumbnail) for one in measures], np.uint8).reshape(-1, 8, 8, 3),
        np.array([one.width * one.height for one in measures]),
    )


def encode(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_copies_of_a_picture_are_found(tmp_path):
    originals = [Image.fromarray(render(figure).image) for figure in draw_figures()]
    copies = [encode(picture, "JPEG", quality=85) for picture in originals]
    copies += [encode(picture.resize((48, 48), Image.Resampling.LANCZOS)) for picture in originals]
    copies += [encode(ImageEnhance.Brightness(picture).enhance(1.08)) for picture in originals]
    copies += [encode(ImageEnhance.Brightness(picture).enhance(0.9)) for picture in originals]
    found = find_copies([*map(encode, originals), *copies], tmp_path)
    assert (found[:FIGURES] == -1).all()
    assert (found[FIGURES:] == np.tile(np.arange(FIGURES), 4)).all()


@pytest.mark.parametrize("part", ["upper_colour", "lower_colour", "hair_colour"])
def test_a_figure_that_differs_in_one_colour_is_no_copy(tmp_path, part):
    originals = draw_figures()
    others = []
    for figure in originals:
        owner = "identity" if part == "hair_colour" else "outfit"
        names = list(HAIR_COLOURS if part == "hair_colour" else GARMENT_COLOURS)
        value = getattr(getattr(figure, owner), part)
        other = names[(names.index(value) + 1) % len(names)]
        others.append(replace(figure, **{owner: replace(getattr(figure, owner), **{part: other})}))
    pictures = [encode(Image.fromarray(render(one).image)) for one in (*originals, *others)]
    assert (find_copies(pictures, tmp_path) == -1).all()


def test_the_largest_copy_stays_and_the_first_of_the_largest(tmp_path):
    picture = Image.fromarray(render(draw_figures(1)[0]).image)
    large = picture.resize((128, 128), Image.Resampling.LANCZOS)
    pictures = [picture, large, large, picture.resize((48, 48))]
    assert find_copies([*map(encode, pictures)], tmp_path).tolist() == [1, -1, 1, 1]


def test_the_search_finds_what_comparing_all_pairs_does(monkeypatch):
    monkeypatch.setattr(duplicates, "_PAIRS", 64)  # many blocks
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (300, 256), np.uint8)
    for row in range(100, 300):  # at every distance around the limit, of any of those before
        flips = rng.choice(256, int(rng.integers(2 * DISTANCE)), replace=False)
        bits[row] = bits[rng.integers(row)]
        bits[row, flips] ^= 1
    thumbnails = rng.integers(100, 110, (300, 8, 8, 3), np.uint8)
    pixels = rng.integers(1, 5, 300)

    expected = np.full(300, -1)
    order = sorted(range(300), key=lambda row: (-pixels[row], row))
    for rank, row in enumerate(order):
        for other in order[:rank]:
            near = (bits[row] != bits[other]).sum() <= DISTANCE
            if near and expected[other] < 0:
                expected[row] = other
                break
    assert 50 < (expected >= 0).sum() < 200
    found = find_duplicates(np.packbits(bits, axis=1), thumbnails, pixels)
    assert (found == expected).all()


def test_no_pictures_and_one_picture_have_no_copies():
    for count in (0, 1):
        hashes, thumbnails = np.zeros((count, 32), np.uint8), np.zeros((count, 8, 8, 3), np.uint8)
        assert find_duplicates(hashes, thumbnails, np.ones(count, int)).tolist() == [-1] * count


def test_thumbnails_of_another_brightness_look_alike_and_of_another_hue_do_not():
    one = np.random.default_rng(0).integers(60, 200, (1, 8, 8, 3)).astype(np.uint8)
    brighter = (one * 1.2).astype(np.uint8)
    other = one.copy()
    other[0, :2, :2] = other[0, :2, :2, ::-1] // 2
    assert look_alike(one, brighter)[0] and look_alike(brighter, one)[0]
    assert not look_alike(one, other)[0]


def test_pictures_are_measured_upright_and_by_their_content(tmp_path):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (30, 50, 3), np.uint8)).resize((500, 300))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    cases = {
        "turned.jpg": encode(picture, "JPEG", exif=exif),
        "grey.png": encode(picture.convert("L")),
        "palette.gif": encode(picture.quantize(), "GIF"),
        "deep.png": encode(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40))),
        "clear.png": encode(picture.convert("RGBA")),
        "print.jpg": encode(picture.convert("CMYK"), "JPEG"),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        measures = measure_file(str(tmp_path), name)
        assert isinstance(measures, Measures), name
        assert measures.sha256 == hashlib.sha256(content).hexdigest()
        image, _ = load_image(tmp_path / name)
        assert (measures.height, measures.width) == image.shape[:2]


def test_a_picture_that_cannot_be_used_has_a_reason(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    whole, folder = encode(picture), tmp_path / "source"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(whole)
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "folder.png").mkdir()
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.jpg").write_bytes(encode(picture, "JPEG")[:900])
    (folder / "text.png").write_text("not a picture")
    (folder / "bomb.png").write_bytes(encode(Image.new("1", (20000, 20000))))
    (folder / "clear.png").write_bytes(encode(Image.new("RGBA", (64, 64), (0, 0, 0, 0))))
    reasons = {path.name: measure_file(str(folder), path.name) for path in folder.iterdir()}
    assert reasons == {
        "link.png": OUTSIDE,
        "folder.png": MISSING,
        "empty.png": EMPTY,
        "cut.png": DAMAGED,
        "cut.jpg": DAMAGED,
        "text.png": NOT_A_PICTURE,
        "bomb.png": TOO_LARGE,
        "clear.png": TRANSPARENT,
    }
    assert measure_file(str(folder), "none.png") == MISSING
    assert measure_file(str(folder), "a\0b.png") == MISSING
    assert measure_file(str(folder), "../outside.png") == OUTSIDE
