"""Sources: every kind is detected and read, and everything that was seen is counted."""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import asdict
from pathlib import Path

import pytest
from refusal import sentence

pytest.importorskip("pyarrow")
pytest.importorskip("orjson")

from retrieval_core.data import sources
from retrieval_core.data.filtering import Rules
from retrieval_core.data.sources import (
    NO_METADATA,
    NOT_A_PICTURE,
    OUTSIDE,
    TWICE,
    UNREADABLE,
    Chunk,
    find_chunks,
    make_schema,
    read_chunk,
    read_picture,
    split_caption,
)

RULES = Rules(frozenset({"sketch", "lowres"}), frozenset({"blue_dress", "red_shirt"}))
ALICE = "alice_(wonderland)"


def read(source: Path, rules: Rules = RULES):
    """Rows and rejected counts of all chunks, which first pass through JSON as in a build."""
    rows, rejected = [], {}
    for chunk in find_chunks(source):
        table, reasons = read_chunk(Chunk(**json.loads(json.dumps(asdict(chunk)))), rules)
        assert table.schema == make_schema()
        rows += table.to_pylist()
        for reason, count in reasons.items():
            rejected[reason] = rejected.get(reason, 0) + count
    return rows, rejected


def post(number, general="1girl blue_dress", character=ALICE, artist="tenniel", **more):
    return {
        "id": number, "file_ext": "png", "tag_string_general": general,
        "tag_string_character": character, "tag_string_artist": artist,
        "tag_string_copyright": "wonderland", "tag_string_meta": "highres", **more,
    }  # fmt: skip


def write_lines(path: Path, posts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [one if isinstance(one, str) else json.dumps(one) for one in posts]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"picture")


# Danbooru


def test_lines_of_danbooru_2021_are_kept_or_counted_by_reason(tmp_path):
    posts = [
        post(1001),
        post(1002, general="1girl blue_dress sketch"),
        post(1003, tag_string_meta="lowres"),
        post(1004, character=""),
        post(1005, character=f"{ALICE} bill"),
        post(1006, general="1girl shoes"),
        post(1007, file_ext="webm"),
        post(1008, file_ext="../../etc/passwd"),
        json.dumps(post(1009))[:50],
        "",
        "[]",
        '"text"',
        json.dumps({"id": "../1", **{k: v for k, v in post(0).items() if k != "id"}}),
        post(1010, artist="tenniel dodgson"),
        post(1011, artist="", tag_string_meta=None),
    ]
    write_lines(tmp_path / "metadata" / "posts.json", posts)
    (tmp_path / "original" / "0001").mkdir(parents=True)
    rows, rejected = read(tmp_path)
    assert rejected == {
        "unwanted tag": 2, "no character tag": 1, "several characters": 1, "no clothing tag": 1,
        NOT_A_PICTURE: 2, UNREADABLE: 4,
    }  # fmt: skip
    assert len(rows) + sum(rejected.values()) == len(posts) - 1  # an empty line is no post
    assert rows[0] == {
        "root": str(tmp_path), "image": "original/0001/1001.png", "tags": ["1girl", "blue_dress"],
        "character": ALICE, "artist": "tenniel", "caption": None, "head_box": None, "mask": None,
        "parts": None, "source": "danbooru2021", "licence": None,
    }  # fmt: skip
    assert [row["artist"] for row in rows] == ["tenniel", None, None]


def test_lines_of_danbooru_2019_name_each_tag_with_its_category(tmp_path):
    kinds = {"1girl": "0", "red_shirt": "0", ALICE: "4", "tenniel": "1", "wonderland": "3"}
    tags = [{"id": "9", "name": name, "category": kind} for name, kind in kinds.items()]
    unwanted = [*tags, {"id": "3", "name": "lowres", "category": "5"}]
    lines = [
        {"id": "2999", "file_ext": "jpg", "tags": tags},
        {"id": "3000", "file_ext": "jpg", "tags": unwanted},
        {"id": "3001", "file_ext": "jpg", "tags": [{"name": 3, "category": "0"}]},
    ]
    write_lines(tmp_path / "metadata" / "20190000000000", lines)
    (tmp_path / "512px" / "0999").mkdir(parents=True)
    (row,), rejected = read(tmp_path)
    assert rejected == {"unwanted tag": 1, UNREADABLE: 1}
    assert (row["image"], row["source"]) == ("512px/0999/2999.jpg", "danbooru2019")
    assert (row["tags"], row["character"], row["artist"]) == (
        ["1girl", "red_shirt"],
        ALICE,
        "tenniel",
    )


@pytest.mark.parametrize(
    ("made", "image"),
    [
        ("original/0007/x", "original/0007/7.png"),
        ("original/x", "original/7.png"),
        ("512px/0007/x", "512px/0007/7.jpg"),
        ("0007/x", "0007/7.png"),
        ("x", "7.png"),
    ],
)
def test_pictures_lie_in_buckets_or_flat(tmp_path, made, image):
    write_lines(tmp_path / "posts.jsonl", [post(7)])
    touch(tmp_path, made)
    for source in (tmp_path, tmp_path / "posts.jsonl"):
        (row,), _ = read(source)
        assert (row["root"], row["image"]) == (str(tmp_path), image)


def test_every_line_is_in_exactly_one_chunk_wherever_the_cuts_are(tmp_path, monkeypatch):
    posts = [post(number, general="blue_dress " + "x" * (number % 40)) for number in range(60)]
    write_lines(tmp_path / "posts.json", posts)
    whole, _ = read(tmp_path)
    assert len(whole) == 60
    first = (tmp_path / "posts.json").read_bytes().index(b"\n") + 1
    for size in (1, 97, first - 1, first, first + 1, 1000):
        monkeypatch.setattr(sources, "CHUNK_BYTES", size)
        assert read(tmp_path)[0] == whole, size
    text = (tmp_path / "posts.json").read_text()
    (tmp_path / "posts.json").write_text(text[:-1])  # no line break at the end
    assert read(tmp_path)[0] == whole


def test_a_link_out_of_the_folder_is_rejected_and_one_within_is_not(tmp_path):
    root, elsewhere = tmp_path / "booru", tmp_path / "elsewhere"
    write_lines(root / "posts.json", [post(1), post(2), post(1003)])
    touch(root, "0001/1.png")
    touch(elsewhere, "2.png", "1003.png")
    (root / "0002").mkdir()
    (root / "0002" / "2.png").symlink_to(elsewhere / "2.png")
    (root / "0003").symlink_to(elsewhere)
    rows, rejected = read(root)
    assert [row["image"] for row in rows] == ["0001/1.png"] and rejected == {OUTSIDE: 2}
    (root / "0002" / "2.png").unlink()
    (root / "0002" / "2.png").symlink_to(root / "0001" / "1.png")
    assert len(read(root)[0]) == 2


def test_the_stamp_follows_the_metadata_and_the_folders_of_pictures(tmp_path):
    write_lines(tmp_path / "posts.json", [post(1)])
    touch(tmp_path, "original/0001/1.png")
    stamps = [find_chunks(tmp_path)[0].stamp, find_chunks(tmp_path)[0].stamp]
    bucket = tmp_path / "original" / "0001"
    os.utime(bucket, ns=(1, 1))
    stamps.append(find_chunks(tmp_path)[0].stamp)
    write_lines(tmp_path / "posts.json", [post(1), post(2)])
    stamps.append(find_chunks(tmp_path)[0].stamp)
    assert stamps[0] == stamps[1] and len(set(stamps)) == 3


def test_masks_parts_and_boxes_beside_a_picture_are_found(tmp_path):
    write_lines(tmp_path / "posts.json", [post(1), post(2)])
    touch(tmp_path, "1.png", "2.png", "masks/2.png", "1.parts.png")
    (tmp_path / "1.box.json").write_text("[1, 2, 30, 40]")
    first, second = read(tmp_path)[0]
    assert (first["mask"], first["head_box"]) == (None, [1, 2, 30, 40])
    assert first["parts"] == str(tmp_path / "1.parts.png")
    assert (second["mask"], second["parts"]) == (str(tmp_path / "masks" / "2.png"), None)


def test_masks_that_come_later_are_found_by_the_same_process(tmp_path):
    write_lines(tmp_path / "posts.json", [post(1)])
    touch(tmp_path, "0001/1.png")
    os.utime(tmp_path / "0001", ns=(1, 1))
    assert read(tmp_path)[0][0]["mask"] is None
    touch(tmp_path, "0001/1.mask.png")
    assert read(tmp_path)[0][0]["mask"] is not None


# gallery-dl


def test_sidecars_of_gallery_dl_tell_tags_by_kind_in_the_ways_of_its_sites(tmp_path):
    kinds = {"general": ["blue_dress"], "character": [ALICE], "artist": ["tenniel"]}
    told = {
        "a/danbooru_1.png": post(1),
        "a/rule34_2.jpg": {f"tags_{kind}": " ".join(tags) for kind, tags in kinds.items()},
        "b/itaku_3.webp": {f"tags_{kind}": tags for kind, tags in kinds.items()},
        "b/e621_4.PNG": {"tags": {**kinds, "species": ["rabbit"]}, "license": "CC-BY-4.0"},
        "b/pixiv_5.png": {"tags": ["blue dress", "alice"]},
        "b/bad_6.png": "{",
        "b/bad_7.png": [1],
    }
    for image, value in told.items():
        touch(tmp_path, image)
        text = value if isinstance(value, str) else json.dumps(value, indent=4)
        (tmp_path / f"{image}.json").write_text(text)
    touch(tmp_path, "b/alone_8.png", "b/video.mp4")
    rows, rejected = read(tmp_path)
    assert rejected == {"no character tag": 1, UNREADABLE: 2, NO_METADATA: 1}
    assert sorted(row["image"] for row in rows) == sorted(list(told)[:4])
    for row in rows:
        assert (row["character"], row["artist"], row["source"]) == (ALICE, "tenniel", "gallery-dl")
        assert "blue_dress" in row["tags"]
    assert {row["licence"] for row in rows} == {None, "CC-BY-4.0"}


# Folders


def test_kohya_folders_name_the_character_and_captions_its_tags(tmp_path):
    touch(tmp_path, *(f"10_alice liddell/{name}.png" for name in "abcdefg"), "2_bill/h.jpg")
    alice = tmp_path / "10_alice liddell"
    (alice / "a.txt").write_text("1girl, Blue Dress, smile\n")
    (alice / "b.txt").write_text("1girl, sketch, blue dress")
    (alice / "c.txt").write_text("1girl, shoes")
    (alice / "d.caption").write_text("A girl in a garden, who talks to a caterpillar.")
    (alice / "e.json").write_text(json.dumps({"caption": "At tea.", "tags": "1girl, red shirt"}))
    (alice / "f.json").write_text(json.dumps("red shirt, hat"))
    (alice / "g.txt").write_bytes(b"\xff")
    rows, rejected = read(tmp_path)
    assert rejected == {"unwanted tag": 1, "no clothing tag": 1, UNREADABLE: 1}
    found = {row["image"][-5:]: row for row in rows}
    assert sorted(found) == ["a.png", "d.png", "e.png", "f.png", "h.jpg"]
    assert {row["character"] for row in rows} == {"alice liddell", "bill"}
    assert found["a.png"]["tags"] == ["1girl", "Blue Dress", "smile"]
    assert found["d.png"]["tags"] == [] and found["d.png"]["caption"].startswith("A girl")
    assert found["e.png"]["tags"] == ["1girl", "red shirt"]
    assert found["e.png"]["caption"] == "At tea."
    assert found["f.png"]["tags"] == ["red shirt", "hat"]
    assert {row["source"] for row in rows} == {"kohya"}


def test_plain_folders_are_characters_and_the_ones_below_artists(tmp_path):
    touch(tmp_path, "alice/1.png", "alice/tenniel/2.png", "alice/tenniel/old/3.png", "4.png")
    touch(tmp_path, "alice/1.mask.png", "alice/masks/1.png", ".hidden/5.png", "notes.txt")
    rows, rejected = read(tmp_path)
    assert rejected == {}
    assert [(row["image"], row["character"], row["artist"]) for row in rows] == [
        ("4.png", tmp_path.name, None),
        ("alice/1.png", "alice", None),
        ("alice/tenniel/2.png", "alice", "tenniel"),
        ("alice/tenniel/old/3.png", "alice", "tenniel"),
    ]
    assert rows[1]["mask"] == str(tmp_path / "alice" / "1.mask.png")


def test_links_out_of_folders_are_counted_and_their_captions_not_read(tmp_path):
    root, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    touch(elsewhere, "1.png", "2.png", "secret.txt")
    touch(root, "alice/0.png")
    (root / "alice" / "1.png").symlink_to(elsewhere / "1.png")
    (root / "bill").symlink_to(elsewhere)
    (root / "cat").symlink_to(root / "alice")  # entered where it is, not twice
    (root / "alice" / "0.txt").symlink_to(elsewhere / "secret.txt")
    (row,), rejected = read(root)
    assert rejected == {OUTSIDE: 2}
    assert (row["image"], row["caption"]) == ("alice/0.png", None)


def test_names_that_are_not_utf8_do_not_stop_the_scan(tmp_path):
    folder = tmp_path / "alice"
    folder.mkdir()
    try:
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_bytes(b"picture")
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    touch(tmp_path, "alice/1.png")
    rows, _ = read(tmp_path)
    assert [row["image"] for row in rows] == ["alice/1.png", "alice/\\udcff.png"]


def test_files_are_split_into_chunks_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_FILES", 3)
    touch(tmp_path, *(f"alice/{number}.png" for number in range(8)))
    chunks = find_chunks(tmp_path)
    assert [len(chunk.files) for chunk in chunks] == [3, 3, 2]
    assert [row["image"] for row in read(tmp_path)[0]] == [f"alice/{n}.png" for n in range(8)]


# WebDataset


def write_shard(path: Path, members) -> None:
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))


def test_samples_of_a_shard_are_read_with_their_metadata(tmp_path):
    told = json.dumps(post(1)).encode()
    plain = {"character": "Alice Liddell", "tags": ["red shirt"], "caption": "At tea."}
    shard = tmp_path / "000.tar"
    write_shard(
        shard,
        [
            ("a.png", b"first"), ("a.json", told), ("a.mask.png", b"mask"),
            ("d/b.json", json.dumps(plain).encode()), ("d/b.jpg", b"second"),
            ("c.png", b"x"),
            ("e.png", b"x"), ("e.txt", b"1girl, blue dress"),
            ("../f.png", b"x"), ("../f.json", told),
            ("/g.png", b"x"), ("/g.json", told),
            ("h.png", b"x"), ("h.json", b"{"),
            ("a.png", b"again"), ("a.json", told),
            ("readme.md", b"x"),
        ],
    )  # fmt: skip
    with tarfile.open(shard, "a") as file:
        link = tarfile.TarInfo("i.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    rows, rejected = read(tmp_path)
    assert rejected == {
        NO_METADATA: 1, "no character tag": 1, OUTSIDE: 3, UNREADABLE: 1, TWICE: 1,
    }  # fmt: skip
    assert [(row["root"], row["image"]) for row in rows] == [
        (str(shard), "a.png"),
        (str(shard), "d/b.jpg"),
    ]
    assert rows[1]["character"] == "Alice Liddell" and rows[1]["caption"] == "At tea."
    assert [read_picture(row["root"], row["image"]) for row in rows] == [b"first", b"second"]
    assert read(shard) == (rows, rejected)


def test_a_shard_that_is_cut_off_gives_what_is_whole(tmp_path):
    told = json.dumps(post(1)).encode()
    shard = tmp_path / "000.tar"
    write_shard(
        shard, [("a.json", told), ("a.png", b"x"), ("b.json", told), ("b.png", b"y" * 9000)]
    )
    shard.write_bytes(shard.read_bytes()[:5000])
    rows, rejected = read(shard)
    assert [row["image"] for row in rows] == ["a.png"] and rejected == {UNREADABLE: 1}
    assert read_picture(str(shard), "a.png") == b"x"
    shard.write_bytes(b"no tar at all")
    assert read(shard) == ([], {UNREADABLE: 1})


def test_pictures_of_folders_are_read_as_they_are(tmp_path):
    touch(tmp_path, "alice/1.png")
    assert read_picture(str(tmp_path), "alice/1.png") == b"picture"
    with pytest.raises(FileNotFoundError):
        read_picture(str(tmp_path), "alice/2.png")


# Refusals and captions


def test_what_is_no_source_is_refused_in_one_sentence(tmp_path):
    assert "no source" in sentence(find_chunks, tmp_path / "none")
    assert "no pictures" in sentence(find_chunks, tmp_path)
    touch(tmp_path, "alice/notes.txt", "alice/1.mask.png")
    assert "no pictures" in sentence(find_chunks, tmp_path)
    (tmp_path / "list.json").write_text(json.dumps([post(1)]))
    assert "one JSON object a line" in sentence(find_chunks, tmp_path / "list.json")


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("1girl, blue dress", ["1girl", "blue dress"]),
        ("1girl", ["1girl"]),
        ("1girl,\nhair over one eye, ", ["1girl", "hair over one eye"]),
        ("A girl walks along a river, smiling", None),
        ("A girl, smiling.", None),
        (" ", None),
    ],
)
def test_captions_are_tags_or_prose(text, tags):
    assert split_caption(text) == tags
