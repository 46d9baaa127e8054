"""The demo as a user starts it, and what it says of bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from retrieval_core.errors import RetrievalError
from retrieval_core.paperdoll import demo
from retrieval_core.paperdoll.cases import make_composition_case
from retrieval_core.sheets import Row, Tile, write_sheet


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    case = make_composition_case(5, 0)
    for index, name in ((0, "face"), (2, "outfit")):
        pixels = (case.references[index].image.movedim(0, -1) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def test_the_demo_writes_both_sheets_and_prints_the_rates(tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path), "--count", "2", "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    for name in ("same_character.png", "composition.png"):
        with Image.open(tmp_path / name) as sheet:
            assert sheet.format == "PNG" and sheet.width > 900
            assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 500
        assert name in printed
    assert "hair colour" in printed and "chance" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["composition.png", "same_character.png"]


def test_own_references(own, tmp_path, capsys):
    arguments = [
        "--reference",
        f"{own}/face.png:face",
        "--reference",
        f"{own}/outfit.png:clothes:0.5",
    ]
    arguments += ["--prompt", "waving, smile, beach", "--out", str(tmp_path), "--steps", "2"]
    assert demo.main(arguments) == 0
    assert (tmp_path / "own_references.png").is_file()
    assert "own_references.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{own}/nothing.png:face", "nothing.png"),
        ("{own}/face.png:hat", "'hat'"),
        ("{own}/face.png:face:nan", "nan"),
        ("{own}/face.png:face:-1", "-1"),
        ("{own}:face", "folder"),
    ],
)
def test_bad_references_are_one_sentence(own, tmp_path, capsys, text, words):
    text = text.format(own=own)
    assert demo.main(["--reference", text, "--out", str(tmp_path), "--steps", "2"]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_all_weights_zero_and_unknown_tags_are_one_sentence(own, tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--steps", "2", "--reference"]
    assert demo.main([*arguments, f"{own}/face.png:face:0"]) == 2
    assert "weight 0" in capsys.readouterr().err
    assert demo.main([*arguments, f"{own}/face.png:face", "--prompt", "flying"]) == 2
    assert "'flying'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    assert demo.main(["--out", str(blocked), "--count", "1", "--steps", "2"]) == 2
    assert str(blocked) in capsys.readouterr().err
    assert blocked.read_text() == "kept"


@pytest.mark.parametrize("text", ["a.png", "a.png:face", "a.png:face:0.5"])
def test_a_file_name_with_a_colon_works(tmp_path, text):
    folder = tmp_path / "with:colon"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    reference = demo.read_reference(f"{folder}/{text}")
    assert reference.image.shape == (3, 64, 64)


def test_a_sheet_of_uneven_rows(tmp_path):
    tile = Tile(torch.rand(3, 8, 8), "a", (1.0, 0.0, 0.0))
    write_sheet(tmp_path / "s.png", "t", "s", [Row("r", [], [tile]), Row("q", [tile] * 3, [tile])])
    assert Image.open(tmp_path / "s.png").height > 300
    with pytest.raises(RetrievalError):
        write_sheet(tmp_path / "s.png" / "x.png", "t", "s", [Row("r", [], [tile])])
