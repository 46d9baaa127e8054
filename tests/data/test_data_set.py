"""The data set's format: what is written is read back, what is wrong is told."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from refusal import sentence

from retrieval_core.data import data_set as module
from retrieval_core.data import open_data_set
from retrieval_core.data.contact_sheet import choose_outfits, write_contact_sheet
from retrieval_core.data.data_set import (
    INDEX,
    INFO,
    SCHEMA,
    check_data_set,
    count_stats,
    is_held_out,
    read_info,
    schema,
    write_data_set,
)
from retrieval_core.errors import RetrievalError

pa = pytest.importorskip("pyarrow")

WIDTH, HEIGHT = 12, 16


def make_row(folder, number, character="ann", artist="bob", outfit=0, **more):
    """A row as the build hands it over, and its picture of one colour."""
    path = folder / f"{number:03d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (number, 100, 200)).save(path)
    return {
        "root": str(folder),
        "image": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "width": WIDTH,
        "height": HEIGHT,
        "character": character,
        "artist": artist,
        "outfit": outfit,
        "tags": ["smile", "long_hair"],
        "caption": None,
        "head_box": [2, 1, 8, 7],
        "mask": None,
        "parts": None,
        "source": "folders",
        "licence": None,
        "hash": "not of the format",
        **more,
    }


def write(folder, rows, **more):
    write_data_set(folder, pa.Table.from_pylist(rows), {"command": "of a test"}, **more)
    return open_data_set(folder)


@pytest.fixture
def rows(tmp_path):
    """Of ann two outfits and a picture of unknown outfit, of cid one outfit by nobody known."""
    source = tmp_path / "source"
    outfits = [0, 0, 0, 1, 1, -1, -1]
    made = [make_row(source, i, outfit=outfit) for i, outfit in enumerate(outfits)]
    made += [make_row(source, i, "cid", None, 0) for i in (7, 8)]
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[3:9, 2:7] = 255
    Image.fromarray(mask).save(source / "000.mask.png")
    Image.fromarray(mask // 85).save(source / "000.parts.png")
    made[0] |= {"mask": str(source / "000.mask.png"), "parts": str(source / "000.parts.png")}
    made[1] |= {"head_box": None, "tags": [], "caption": "a smile"}
    return made


def test_what_is_written_is_read_back(tmp_path, rows):
    data_set = write(tmp_path / "out", rows)
    assert len(data_set) == len(rows)
    for i, row in enumerate(rows):
        sample, values = data_set[i], data_set.read_row(i)
        assert (sample.image == (i, 100, 200)).all() and sample.image.shape == (HEIGHT, WIDTH, 3)
        assert sample.head_box == (tuple(row["head_box"]) if row["head_box"] else None)
        assert {
            k: values[k] for k in SCHEMA if k in row and k not in ("root", "mask", "parts")
        } == {k: row[k] for k in SCHEMA if k in row and k not in ("root", "mask", "parts")}
    assert data_set[0].mask[3:9, 2:7].all() and data_set[0].mask.sum() == 30
    assert (data_set[0].parts == 3 * data_set[0].mask).all()
    assert data_set[1].mask is None and data_set[1].parts is None
    assert data_set[0].tags == ["smile", "long_hair"] and data_set[1].tags == ["a smile"]
    info = read_info(tmp_path / "out")
    assert info["roots"] == {"source": str(tmp_path / "source")}
    assert info["made"] == {"command": "of a test"}
    assert info["counts"] == {"images": 9, "characters": 2}
    assert check_data_set(tmp_path / "out") == {}


def test_pandas_and_parquet_readers_see_the_columns(tmp_path, rows):
    import pyarrow.parquet as pq

    write(tmp_path / "out", rows)
    table = pq.read_table(tmp_path / "out" / INDEX)
    assert table.schema.equals(schema()) and table.column_names == list(SCHEMA)


def test_the_same_rows_are_written_byte_for_byte(tmp_path, rows):
    for name in ("one", "two"):
        write(tmp_path / name, rows, copy=True)
    files = [p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()]
    assert len(files) == 2 + 9 + 2
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_copied_pictures_outlive_their_source(tmp_path, rows):
    folder = tmp_path / "source"
    names = {p.name: p.read_bytes() for p in folder.iterdir()}
    data_set = write(tmp_path / "out", rows, copy=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == names
    for path in folder.iterdir():
        path.unlink()
    assert [int(data_set[i].image[0, 0, 0]) for i in range(9)] == list(range(9))
    assert data_set.info["roots"] == {}
    (tmp_path / "out").rename(tmp_path / "moved")
    assert check_data_set(tmp_path / "moved") == {}


def test_shards_are_copied_without_being_asked(tmp_path, rows):
    rows[0]["source"] = "webdataset"
    data_set = write(tmp_path / "out", rows)
    assert data_set.read_row(0)["root"] == "" and data_set.read_row(1)["root"] == "source"


def test_roots_of_one_name_are_told_apart_and_can_be_moved(tmp_path):
    rows = [make_row(tmp_path / side / "pictures", i) for i, side in enumerate(("left", "right"))]
    data_set = write(tmp_path / "out", rows)
    assert list(data_set.info["roots"]) == ["pictures", "pictures-2"]
    assert [int(data_set[i].image[0, 0, 0]) for i in range(2)] == [0, 1]
    (tmp_path / "left").rename(tmp_path / "elsewhere")
    assert check_data_set(tmp_path / "out") == {"the picture is missing": ["000.png"]}
    info = read_info(tmp_path / "out")
    info["roots"]["pictures"] = str(tmp_path / "elsewhere" / "pictures")
    (tmp_path / "out" / INFO).write_text(json.dumps(info))
    assert check_data_set(tmp_path / "out") == {}


def test_a_character_is_on_one_side_of_the_split(tmp_path):
    names = [f"character {i}" for i in range(60)]
    held_out = {name for name in names if is_held_out(name)}
    assert 0 < len(held_out) < 12
    rows = [make_row(tmp_path / "s", i, names[i % 60]) for i in range(120)]
    index = write(tmp_path / "many", rows).index.to_pylist()
    assert {row["character"] for row in index if row["split"] == "held_out"} == held_out
    few = [row for row in rows if row["character"] in held_out]
    assert set(write(tmp_path / "few", few).index["split"].to_pylist()) == {"train"}


def test_groups_are_by_character_artist_and_outfit(tmp_path, rows):
    data_set = write(tmp_path / "out", rows)
    assert data_set.identities.find_members(4).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert data_set.outfits.find_members(4).tolist() == [3, 4]
    # An unknown outfit is nobody's; the outfits 0 of two characters are two.
    assert data_set.outfits.find_members(5).tolist() == [5]
    assert data_set.outfits.find_members(7).tolist() == [7, 8]
    assert data_set.find_targets("same character").tolist() == [0, 1, 2, 3, 4, 7, 8]
    # Row 1 has no head box: it may be a target, and is no reference.
    assert data_set.find_targets("composition").tolist() == [0, 1, 2, 3, 4, 7, 8]
    assert data_set.find_targets("same character", "held_out").tolist() == []


def test_a_picture_whose_only_fellow_has_no_head_box_is_no_target_of_composition(tmp_path):
    rows = [make_row(tmp_path / "s", i) for i in range(2)]
    rows[1]["head_box"] = None
    data_set = write(tmp_path / "out", rows)
    assert data_set.find_targets("same character").tolist() == [0, 1]
    assert data_set.find_targets("composition").tolist() == [1]


def test_stats_count_what_table_1_lists(tmp_path, rows):
    stats = count_stats(write(tmp_path / "out", rows))
    assert stats == {
        "images": 9,
        "held_out": 0,
        "characters": 2,
        "artists": 1,
        "identities": 2,
        "outfits": 3,
        "images_per_identity": {"mean": 4.5, "median": 4.5, "largest": 7.0},
        "images_per_outfit": {"mean": 2.33, "median": 2.0, "largest": 3.0},
        "same_character_targets": 7,
        "composition_targets": 7,
        "with_head_box": 8,
        "with_mask": 1,
        "with_parts": 1,
        "with_caption": 1,
    }


def test_an_empty_data_set_can_be_written_and_read(tmp_path, rows):
    table = pa.Table.from_pylist(rows)[:0]
    write_data_set(tmp_path / "out", table, {})
    data_set = open_data_set(tmp_path / "out")
    assert len(data_set) == 0 and check_data_set(tmp_path / "out") == {}
    assert count_stats(data_set)["outfits"] == 0
    assert len(data_set.find_targets("composition")) == 0
    assert "is empty" in sentence(write_contact_sheet, data_set, tmp_path / "sheet.png")


def test_check_finds_what_was_changed(tmp_path, rows):
    write(tmp_path / "out", rows)
    source = tmp_path / "source"
    (source / "001.png").unlink()
    Image.new("RGB", (WIDTH, HEIGHT)).save(source / "002.png")
    mask = tmp_path / "out" / open_data_set(tmp_path / "out").read_row(0)["mask"]
    mask.write_bytes(b"no picture")
    assert check_data_set(tmp_path / "out") == {
        "the picture is missing": ["001.png"],
        "the picture was changed": ["002.png"],
        "the picture, its mask or its head box cannot be read": ["000.png"],
    }


def test_check_finds_a_mask_that_was_painted_over(tmp_path, rows):
    data_set = write(tmp_path / "out", rows)
    mask = tmp_path / "out" / data_set.read_row(0)["mask"]
    Image.new("L", (WIDTH, HEIGHT), 255).save(mask)
    assert list(check_data_set(tmp_path / "out")) == [
        "the index or a mask was changed after the data set was built"
    ]


def test_a_picture_of_another_size_is_refused(tmp_path, rows):
    data_set = write(tmp_path / "out", rows)
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "source" / "003.png")
    assert "has 16x12 pixels and had 12x16 when" in sentence(data_set.__getitem__, 3)


@pytest.mark.parametrize("image", ["../secret.png", "/etc/secret.png"])
def test_an_index_that_leaves_its_roots_is_refused(tmp_path, rows, image):
    data_set = write(tmp_path / "out", [{**rows[0], "mask": None, "parts": None, "image": image}])
    assert "not a path below a root" in sentence(data_set.__getitem__, 0)


def test_folders_that_are_no_data_set_are_refused(tmp_path, rows):
    assert "is not a data set" in sentence(open_data_set, tmp_path / "nothing")
    out = tmp_path / "out"
    write(out, rows)
    text = (out / INFO).read_text()
    for old, new, words in (
        (text, "[]", "not a JSON object"),
        (text, "{", "is not JSON"),
        ('"retrieval_data_set"', '"other"', "has the format 'other'"),
        ('"format_version": 1', '"format_version": 2', "has format version 2"),
    ):
        (out / INFO).write_text(text.replace(old, new))
        assert words in sentence(open_data_set, out)
    (out / INFO).write_text(text)
    (out / INDEX).write_bytes(b"PAR1")
    assert "cannot be read" in sentence(open_data_set, out)


def test_a_picture_that_changes_while_it_is_copied_stops_the_writing(tmp_path, rows):
    (tmp_path / "source" / "004.png").write_bytes(b"changed")
    words = sentence(write_data_set, tmp_path / "out", pa.Table.from_pylist(rows), {}, copy=True)
    assert "'004.png'" in words and "changed while" in words


def test_a_full_disk_is_one_sentence(tmp_path, rows, monkeypatch):
    def fill(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_bytes", fill)
    words = sentence(write_data_set, tmp_path / "out", pa.Table.from_pylist(rows), {}, copy=True)
    assert "No space left on device" in words and "enough room" in words


def test_the_sheet_shows_outfits_of_characters_spread_over_the_data_set(tmp_path, rows):
    data_set = write(tmp_path / "out", rows)
    assert [members.tolist() for members in choose_outfits(data_set, 9)] == [
        [0, 1, 2],
        [3, 4],
        [5, 6],
        [7, 8],
    ]
    assert len(choose_outfits(data_set, 2)) == 2
    write_contact_sheet(data_set, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20)}
    assert {(number, 100, 200) for number in range(9)} <= colours
    assert (230, 61, 61) in colours  # a head box's frame


def test_samples_refuse_bad_rows_as_they_do_elsewhere(tmp_path, rows):
    rows[0]["head_box"] = [50, 50, 60, 60]
    data_set = write(tmp_path / "out", rows)
    with pytest.raises(RetrievalError, match="covers nothing"):
        data_set[0]
