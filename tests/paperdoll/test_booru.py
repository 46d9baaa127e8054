"""The paper-doll booru is what its truth says, and its measurement counts pairs."""

import io
import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from refusal import sentence

from retrieval_core.data.annotating import Picture
from retrieval_core.data.beside import find_beside
from retrieval_core.data.data_set import write_data_set
from retrieval_core.data.filtering import load_rules
from retrieval_core.data.sources import find_chunks, read_chunk
from retrieval_core.paperdoll.booru import (
    COPIES,
    FAULTS,
    PLAIN,
    make_booru,
    plan_posts,
    read_figure,
)
from retrieval_core.paperdoll.draw import render
from retrieval_core.paperdoll.measure_booru import (
    Truth,
    TruthAnnotator,
    compare_clusters,
    measure_booru,
    score_pairs,
)
from retrieval_core.paperdoll.world import is_held_out

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("orjson")

COUNT = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("booru")
    make_booru(folder, COUNT, seed=3)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return pq.read_table(folder / "truth.parquet").to_pylist()


def open_picture(folder, row):
    content = (folder / "booru" / row["image"]).read_bytes()
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_a_disjoint_booru_has_nothing_that_the_measurement_holds_out():
    posts = plan_posts(1500, 1, alike=0.5, held_out=False)
    figures = [figure for post in posts for figure in post.figures]
    assert not any(is_held_out(f.identity) or is_held_out(f.outfit) for f in figures)
    mixed = [figure for post in plan_posts(1500, 1) for figure in post.figures]
    assert any(is_held_out(f.identity) for f in mixed)


def test_all_posts_can_be_annotated(tmp_path):
    make_booru(tmp_path, 60, annotated=1.0)
    rows = pq.read_table(tmp_path / "truth.parquet").to_pylist()
    for row in rows:
        alone = row["copy_of"] is None and row["kind"] != "several characters"
        assert row["annotated"] == alone


def test_every_kind_of_fault_is_there_as_often_as_said(rows):
    assert len(rows) == COUNT and len({row["id"] for row in rows}) == COUNT
    counts = Counter(row["kind"] for row in rows)
    faulty = {kind: round(share * COUNT) for kind, share in FAULTS.items()}
    assert dict(counts) == {**faulty, PLAIN: COUNT - sum(faulty.values())}


def test_a_booru_is_the_same_again(folder, tmp_path):
    make_booru(tmp_path / "again", COUNT, seed=3)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert files == sorted(
        p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file()
    )
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_files_are_as_their_kind_says(folder, rows):
    for row in rows:
        path, kind = folder / "booru" / row["image"], row["kind"]
        if kind == "missing file":
            assert not path.exists()
        elif kind == "empty file":
            assert path.read_bytes() == b""
        elif kind == "truncated file":
            with pytest.raises(OSError), Image.open(path) as image:
                image.load()
        else:
            shape = open_picture(folder, row).shape
            assert shape[1] == (2 if kind == "several characters" else 1) * shape[0]


def test_copies_look_like_what_they_are_copies_of(folder, rows):
    by_id = {row["id"]: row for row in rows}
    for row in rows:
        assert (row["copy_of"] is not None) == (row["kind"] in COPIES)
        if row["copy_of"] is None:
            continue
        original = by_id[row["copy_of"]]
        assert original["kind"] == PLAIN
        assert (row["character"], row["artist"], row["outfit"], row["figure"]) == (
            original["character"], original["artist"], original["outfit"], original["figure"],
        )  # fmt: skip
        one, other = open_picture(folder, original), open_picture(folder, row)
        assert (one.shape != other.shape) == (row["kind"] == "resized copy")
        small = Image.fromarray(other).resize(one.shape[:2][::-1], Image.Resampling.BOX)
        difference = np.abs(np.asarray(small, float) - one).mean()
        assert 0 < difference < 20


def test_pictures_of_one_role_differ_in_pose_or_background(rows):
    seen = {}
    changes = 0
    for row in rows:
        if row["kind"] != PLAIN:
            continue
        scene = read_figure(row["figure"]).scene
        key = (row["character"], row["artist"], scene.pose, scene.background)
        if key in seen:  # a change of clothes in one scene
            assert seen[key]["outfit"] != row["outfit"]
            assert read_figure(seen[key]["figure"]).scene == scene
            changes += 1
        seen[key] = row
    assert changes > 5


def test_what_lies_beside_is_the_truth(folder, rows):
    annotated = 0
    for row in rows:
        mask, parts, box = find_beside(folder / "booru" / row["image"])
        assert row["annotated"] == (mask is not None) == (parts is not None) == (box is not None)
        if mask is not None:
            rendering = render(read_figure(row["figure"]))
            assert (np.asarray(Image.open(mask)) == 255 * rendering.mask).all()
            assert (np.asarray(Image.open(parts)) == rendering.parts).all()
            assert box == rendering.head_box
            annotated += 1
    assert 0.4 < annotated / COUNT < 0.6


def test_the_scan_rejects_what_the_truth_says(folder, rows):
    rules = load_rules()
    tables, rejected = [], Counter()
    for chunk in find_chunks(folder / "booru"):
        table, counts = read_chunk(chunk, rules)
        tables.append(table)
        rejected.update(counts)
    truth = Counter(row["kind"] for row in rows)
    assert rejected == {
        "unwanted tag": truth["unwanted tag"],
        "several characters": truth["several characters"],
        "no character tag": truth["no character"],
        "no clothing tag": truth["trivial clothes"],
        "unreadable metadata": truth["unreadable line"],
    }
    by_image = {row["image"]: row for row in rows}
    unnamed = 0
    for row in pa.concat_tables(tables).to_pylist():
        true = by_image[row["image"]]
        assert row["character"] == true["character"]
        assert row["artist"] in (true["artist"], None)
        unnamed += row["artist"] is None
    assert 1 <= unnamed < 30


def test_outfits_of_a_role_have_colours_of_their_own_unless_asked():
    shares = []
    for alike in (0.0, 0.25):
        outfits = {}
        for post in plan_posts(4000, 0, alike):
            outfit = post.figures[0].outfit
            outfits[post.character, post.artist, post.outfit] = (
                outfit.upper_colour,
                outfit.lower_colour,
            )
        colours = Counter((key[:2], value) for key, value in outfits.items())
        shares.append(1 - len(colours) / len(outfits))
    assert shares[0] == 0 and 0.08 < shares[1] < 0.2


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "is not empty" in sentence(make_booru, tmp_path, 10)


@pytest.fixture(scope="module")
def truth(folder):
    return Truth.load(folder)


def test_truth_annotates_copies_of_any_size(folder, rows, truth):
    resized = [row for row in rows if row["kind"] == "resized copy"]
    wanted = [*resized, *(row for row in rows[:20] if row["kind"] == PLAIN)]
    assert len(resized) == 20 and len(wanted) > 30
    pictures = [Picture(open_picture(folder, row), row["sha256"]) for row in wanted]
    masks = TruthAnnotator("mask", truth.figures).annotate(pictures)
    boxes = TruthAnnotator("head_box", truth.figures).annotate(pictures)
    for row, picture, mask, box in zip(wanted, pictures, masks, boxes):
        rendering = render(read_figure(row["figure"]))
        side = picture.image.shape[0]
        assert mask.dtype == bool and mask.shape == (side, side)
        assert mask.mean() == pytest.approx(rendering.mask.mean(), abs=0.02)
        assert np.array(box) / side == pytest.approx(np.array(rendering.head_box) / 64, abs=0.02)


@pytest.mark.parametrize("wrong", [0.0, 0.3])
def test_answers_are_wrong_as_often_as_said(truth, wrong):
    pictures = [Picture(np.zeros((1, 1, 3), np.uint8), digest) for digest in truth.rows]
    annotator = TruthAnnotator("answer", truth.figures, wrong)
    answers = annotator.annotate(pictures)
    assert answers == annotator.annotate(pictures[::-1])[::-1]
    outfits = [truth.figures[picture.sha256].outfit for picture in pictures]
    right = [
        f"{o.upper_colour} and {o.lower_colour}" in a or f"{o.upper_colour}, {o.lower_colour}" in a
        for o, a in zip(outfits, answers)
    ]
    assert 1 - np.mean(right) == pytest.approx(wrong, abs=0.05 if wrong else 0)


def test_pairs_are_counted_as_by_hand():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 5, 40).tolist()
    found = [None if n == 4 else n for n in rng.integers(0, 5, 40).tolist()]
    wanted = [*true, 0, 0, 3]
    pairs = list(combinations(range(40), 2))
    made = [(a, b) for a, b in pairs if found[a] is not None and found[a] == found[b]]
    right = [(a, b) for a, b in made if true[a] == true[b]]
    there = sum(a == b for a, b in combinations(wanted, 2))
    assert score_pairs(found, true, wanted) == {
        "precision": round(len(right) / len(made), 4),
        "recall": round(len(right) / there, 4),
    }


def test_a_faultless_data_set_scores_one_and_merged_outfits_cost_precision(
    folder, rows, truth, tmp_path
):
    keepable = list(truth.find_keepable().values())
    table = [
        {
            "root": str(folder / "booru"),
            **{name: row[name] for name in ("image", "sha256", "character", "artist", "outfit")},
            **dict.fromkeys(("width", "height"), 64),
            **dict.fromkeys(("mask", "parts", "head_box", "caption"), None),
            "tags": [],
            "source": "danbooru2021",
        }
        for row in keepable
    ]
    write_data_set(tmp_path / "right", pa.Table.from_pylist(table), {})
    perfect = {"precision": 1.0, "recall": 1.0}
    scores = compare_clusters(truth, tmp_path / "right")
    assert scores == dict.fromkeys(("character", "artist", "outfit"), perfect)
    merged = pa.Table.from_pylist([{**row, "outfit": 0} for row in table])
    write_data_set(tmp_path / "merged", merged, {})
    scores = compare_clusters(truth, tmp_path / "merged")
    assert scores["character"] == perfect
    assert scores["outfit"]["recall"] == 1 and scores["outfit"]["precision"] < 0.6
    write_data_set(tmp_path / "half", pa.Table.from_pylist(table[::2]), {})
    assert compare_clusters(truth, tmp_path / "half")["character"]["recall"] < 0.4


def test_lines_are_json_but_for_the_unreadable(folder, rows):
    unreadable = 0
    for line in (folder / "booru" / "metadata" / "posts.json").read_text().splitlines():
        try:
            assert {"id", "tag_string_general", "file_ext"} <= json.loads(line).keys()
        except json.JSONDecodeError:
            unreadable += 1
    assert unreadable == sum(row["kind"] == "unreadable line" for row in rows) > 0


def test_a_build_recovers_the_booru(tmp_path):
    pytest.importorskip("daft")
    measured = measure_booru(tmp_path, 300, 2, 0.0)
    pictures = measured["pictures"]
    assert pictures["accounted for"] and pictures["seen"] == 300
    assert pictures["keepable and kept, as it is or as a copy"] == pictures["keepable"] > 200
    assert pictures["faulty and kept"] == {} and pictures["kept twice"] <= 1
    for name in ("garments", "answers, 0% wrong"):
        assert measured[name]["character"] == {"precision": 1.0, "recall": 1.0}
        assert measured[name]["outfit"]["precision"] >= 0.99
        assert measured[name]["outfit"]["recall"] >= 0.9
    right, wrong = (measured[f"answers, {share}% wrong"]["outfit"] for share in (0, 30))
    assert wrong["recall"] < 0.7 < right["recall"]
