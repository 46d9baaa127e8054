"""Cached latents and prompts: what is stored, resumed building, and what is refused."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pyarrow")
from cached_data_set import (
    ROWS,
    SIZE,
    FakeBase,
    configure,
    embed_text,
    write_pictures,
)
from refusal import sentence

from retrieval_core.data import open_data_set
from retrieval_core.data.data_set import INDEX
from retrieval_core.training import latent_cache as module
from retrieval_core.training.correspondence import UNKNOWN
from retrieval_core.training.latent_cache import (
    check_disk,
    describe_targets,
    fill_cache,
    fingerprint_index,
    measure_cache,
    plan_cache,
    prepare_views,
    refuse_changed_data,
    write_prompt,
)


@pytest.fixture
def data_set(tmp_path):
    return write_pictures(tmp_path)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "PICTURES", 3)
    monkeypatch.setattr(module, "PROMPTS", 5)
    monkeypatch.setattr(module, "_OPEN", {})


def make_cache(data_set, folder, base=None, **changes):
    base = base or FakeBase()
    cache = plan_cache(data_set, base, configure(folder, **changes))
    fill_cache(cache, base)
    return cache


def read_files(cache):
    return {p.name: p.read_bytes() for p in cache.folder.glob("*.safetensors")}


def level(row):
    """The latent of a row's grey."""
    return (20 * row + 10) / 127.5 - 1


def test_every_view_of_a_picture_is_found_again(tmp_path, data_set):
    cache = make_cache(data_set, tmp_path)
    for row in range(len(ROWS)):
        views = prepare_views(cache, row)
        if cache.wanted["target"][row]:
            for number in range(2):
                latent, content, face, _ = cache.read_target(row, number)
                check_latent(latent, views.targets[number])
                check_share(content, views.content[number])
                check_share(face, views.face[number])
        entry = 0
        for concept in ("figure", "face", "clothes"):
            if not cache.wanted[concept][row]:
                continue
            for removed in (False, True) if ROWS[row][4] else (False,):
                for number in range(2):
                    latent, mask, _ = cache.read_reference(row, concept, removed, number)
                    check_latent(latent, views.references[entry])
                    touched = views.masks[entry].reshape(8, 8, 8, 8).any((1, 3))
                    assert mask.dtype == torch.bool and (mask.numpy() == touched).all()
                    entry += 1
        assert entry == len(views.references)


def test_part_labels_follow_the_views_and_are_unknown_where_the_picture_has_none(tmp_path):
    """Row 0 has label 3 on its left half and 0 elsewhere; the others have none."""
    data_set = write_pictures(tmp_path, labelled=(0,))
    cache = make_cache(data_set, tmp_path, correspondence=0.1, views=6)
    flips = set()
    for view in range(6):
        *_, labels = cache.read_target(0, view)
        wanted = prepare_views(cache, 0).parts[view].reshape(16, 4, 16, 4)[:, 2, :, 2]
        assert labels.shape == (16, 16) and (labels.numpy() == wanted).all()
        assert set(labels.unique().tolist()) == {0, 3}
        flips.add(bool(labels[8, 12]))
        assert (cache.read_target(1, view)[3] == UNKNOWN).all()
    assert flips == {False, True}
    assert (cache.read_reference(0, "figure", True, 0)[2] == cache.read_target(0, 0)[3]).all()
    without = make_cache(data_set, tmp_path)
    assert without.read_target(0, 0)[3] is None and without.folder != cache.folder


def test_terms_by_parts_are_refused_without_any_part_labels(tmp_path, data_set):
    config = configure(tmp_path, correspondence=0.2)
    text = sentence(plan_cache, data_set, FakeBase(), config)
    assert "correspondence needs part labels" in text and "--parts" in text


def check_latent(latent, square):
    wanted = square.reshape(8, 8, 8, 8, 3).mean((1, 3)) / 127.5 - 1
    assert latent.dtype == torch.float16
    np.testing.assert_allclose(latent[:3].movedim(0, -1).float().numpy(), wanted, atol=1e-3)


def check_share(share, mask):
    wanted = mask.reshape(8, 8, 8, 8).mean((1, 3))
    np.testing.assert_allclose(share[0].numpy() / 255, wanted, atol=1 / 255)


def test_only_what_the_tasks_can_draw_is_stored(tmp_path, data_set):
    cache = plan_cache(data_set, FakeBase(), configure(tmp_path))
    stored = {name: np.flatnonzero(rows).tolist() for name, rows in cache.wanted.items()}
    assert stored == {
        "target": [0, 1, 2, 3, 4, 5],
        "figure": [0, 1, 2, 3, 4, 5],
        "face": [1, 2, 3, 4, 5, 8],
        "clothes": [1, 2, 3, 4, 5],
    }
    assert cache.shards.tolist() == [0, 0, 0, 1, 1, 1, -1, -1, 2]
    cache = plan_cache(data_set, FakeBase(), configure(tmp_path, task="same character"))
    assert not cache.wanted["face"].any() and not cache.wanted["clothes"].any()


def test_view_zero_is_the_whole_picture_and_a_removed_background_is_one_colour(tmp_path, data_set):
    cache = make_cache(data_set, tmp_path)
    latent, content, face, _ = cache.read_target(2, 0)
    torch.testing.assert_close(latent, torch.full_like(latent, level(2)))
    assert (content == 255).all() and (face[0, :4, 2:6] == 255).all() and face.sum() == 255 * 16
    whole, mask, _ = cache.read_reference(2, "figure", False, 0)
    assert (whole == latent).all() and mask.all()
    cut, mask, _ = cache.read_reference(2, "figure", True, 0)
    assert (cut[..., :4] == latent[..., :4]).all() and mask[:, :4].all()
    filled = cut[..., 4:]
    assert (filled == filled[:, :1, :1]).all() and not (filled == latent[..., 4:]).all()
    assert not mask[:, 4:].any()
    other, mask, _ = cache.read_reference(1, "figure", True, 0)  # has no mask to remove it by
    assert (other == cache.read_reference(1, "figure", False, 0)[0]).all() and mask.all()


def test_backgrounds_that_no_item_shows_are_not_stored(tmp_path, data_set):
    sizes = {}
    for share in (0.0, 0.5, 1.0):
        cache = make_cache(data_set, tmp_path, remove_background=share)
        sizes[share] = len(cache.open_shard("pictures", 0)["references"])
        if share != 0.5:  # both readings give the only one that is stored
            first, second = (cache.read_reference(2, "figure", r, 1)[0] for r in (False, True))
            assert (first == second).all()
    assert sizes[0.0] == sizes[1.0] < sizes[0.5]


def test_views_of_concepts_are_drawn_apart(tmp_path, data_set):
    """Each view has a padding colour of its own, which the corner of a removed background shows."""
    cache = plan_cache(data_set, FakeBase(), configure(tmp_path, remove_background=1.0, views=8))
    corners = prepare_views(cache, 2).references[:, -1, -1].reshape(3, 8, 3)
    figures, faces, clothes = ({tuple(c) for c in one.tolist()} - {(50,) * 3} for one in corners)
    assert min(len(figures), len(faces), len(clothes)) >= 6
    assert not figures & faces and not faces & clothes and not figures & clothes


def test_views_depend_on_the_seed_only(tmp_path, data_set):
    first = prepare_views(plan_cache(data_set, FakeBase(), configure(tmp_path)), 2)
    again = prepare_views(plan_cache(data_set, FakeBase(), configure(tmp_path, views=3)), 2)
    other = prepare_views(plan_cache(data_set, FakeBase(), configure(tmp_path, seed=4)), 2)
    assert (first.targets == again.targets[:2]).all()
    assert not (first.targets[1] == other.targets[1]).all()


def test_prompts_are_the_tags_of_targets(tmp_path, data_set):
    cache = make_cache(data_set, tmp_path)
    for number, text in enumerate(["", "figure", "face", "clothes"]):
        assert (cache.read_prompt(number)[0] == embed_text(text)).all()
    for row in range(6):
        context, y = cache.read_prompt(cache.prompts[row])
        assert (context == embed_text(f"tag {row}")).all() and y is None
    assert len(cache.texts) == 4 + 6
    cache = make_cache(data_set, tmp_path / "xl", FakeBase(width=3))
    assert (cache.read_prompt(5)[1] == embed_text("tag 1")[0, :3]).all()


def test_a_prompt_is_written_with_spaces_but_emoticons_stay():
    assert write_prompt(["long_hair", "^_^"], "a caption") == "long hair, ^_^"
    assert write_prompt([], "a caption") == "a caption" and write_prompt(None, None) == ""


def test_a_whole_cache_is_not_computed_again(tmp_path, data_set):
    base = FakeBase()
    make_cache(data_set, tmp_path, base)
    assert base.vae.encoded > 0
    again = FakeBase()
    make_cache(data_set, tmp_path, again)
    assert again.vae.encoded == 0


def test_a_build_that_broke_off_goes_on_with_what_is_missing(tmp_path, data_set, monkeypatch):
    wanted = read_files(make_cache(data_set, tmp_path / "whole"))
    monkeypatch.setattr(os, "replace", fail_at(3, os.replace))
    message = sentence(make_cache, data_set, tmp_path / "broken")
    assert "No space left on device" in message
    monkeypatch.undo()
    monkeypatch.setattr(module, "PICTURES", 3)
    monkeypatch.setattr(module, "PROMPTS", 5)
    (folder,) = (tmp_path / "broken" / "cache").iterdir()
    assert len(list(folder.glob("*.safetensors"))) == 2
    leftover = folder / ".pictures-000000.safetensors.k1ll3d"
    leftover.write_bytes(b"half")
    cache = make_cache(data_set, tmp_path / "broken")
    assert read_files(cache) == wanted and not leftover.exists()


def fail_at(last, replace):
    """os.replace on a disk that is full after `last` files, the description among them."""
    count = 0

    def replace_or_fail(source, target):
        nonlocal count
        count += 1
        if count > last:
            raise OSError(28, "No space left on device")
        replace(source, target)

    return replace_or_fail


def test_two_processes_fill_what_one_does(tmp_path, data_set):
    wanted = read_files(make_cache(data_set, tmp_path / "one"))
    bases, progress = [FakeBase(), FakeBase()], []
    for rank in (1, 0):
        cache = plan_cache(data_set, bases[rank], configure(tmp_path / "two"))
        fill_cache(cache, bases[rank], rank, 2, lambda *counts: progress.append(counts))
    assert read_files(cache) == wanted and len(wanted) == 3 + 2
    assert all(base.vae.encoded for base in bases)
    assert progress == [(1, 2), (2, 2), (1, 3), (2, 3), (3, 3)]


def test_the_folder_tells_data_base_and_settings_apart(tmp_path, data_set):
    def name(**changes):
        return plan_cache(data_set, FakeBase(), configure(tmp_path, **changes)).folder

    assert name() == name(text_drop=0.1, steps=7, batch_size=9)
    changed = [name(size=128), name(views=3), name(seed=4), name(task="composition")]
    other = FakeBase()
    other.fingerprint = "cd" * 32
    changed.append(plan_cache(data_set, other, configure(tmp_path)).folder)
    assert len({name(), *changed}) == 6


def test_a_changed_data_set_is_noticed(tmp_path, data_set):
    import pyarrow.parquet as pq

    recorded, folder = fingerprint_index(data_set), plan_folder(data_set, tmp_path)
    refuse_changed_data(data_set, recorded)
    index = data_set.folder / INDEX
    pq.write_table(pq.read_table(index).slice(1), index)
    changed = open_data_set(data_set.folder)
    assert str(data_set.folder) in sentence(refuse_changed_data, changed, recorded)
    assert plan_folder(changed, tmp_path) != folder


def plan_folder(data_set, folder):
    return plan_cache(data_set, FakeBase(), configure(folder)).folder


def test_a_changed_picture_is_refused(tmp_path, data_set):
    Image.new("RGB", (SIZE, SIZE), (1, 2, 3)).save(tmp_path / "4.png")
    assert "4.png" in sentence(make_cache, data_set, tmp_path)


def test_a_vae_that_overflows_is_refused(tmp_path, data_set):
    base = FakeBase()
    base.vae.encode = lambda pixels: torch.full((len(pixels), 4, 8, 8), 1e6)
    assert "0.png" in sentence(make_cache, data_set, tmp_path, base)


@pytest.mark.parametrize("task", ["same character", "composition"])
def test_a_data_set_without_identities_is_refused(tmp_path, task):
    rows = [(f"picture {i}", None, 0, True, False) for i in range(3)]
    (tmp_path / "alone").mkdir()
    alone = write_pictures(tmp_path / "alone", rows)
    message = sentence(plan_cache, alone, FakeBase(), configure(tmp_path, task=task))
    assert "None of the 3 pictures" in message and ("head box" in message) == (task[0] == "c")


def test_characters_of_one_picture_are_counted(tmp_path, data_set):
    text = describe_targets(plan_cache(data_set, FakeBase(), configure(tmp_path)))
    assert text.startswith("Training on 6 pictures of 1 characters; 3 pictures are left out")
    assert "all of 1 characters" in text


def test_entries_are_mapped_not_read(tmp_path, data_set):
    """Opening a shard costs no memory of its size: the latents lie in a mapping of the file."""
    cache = make_cache(data_set, tmp_path)
    path = cache.name_shard("pictures", 0)
    cache.open_shard("pictures", 0)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc on this system")
    assert str(path) in maps.read_text()


def test_a_shard_is_the_same_for_any_number_of_threads(tmp_path, data_set, monkeypatch):
    digests = set()
    for count in (1, 7):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        files = read_files(make_cache(data_set, tmp_path / str(count)))
        digests.add(hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("added", [{}, {"part_weight": 1.0, "remove_background": 1.0}])
def test_the_size_on_the_disk_is_known_before(tmp_path, added):
    data_set = write_pictures(tmp_path, labelled=[1, 2])
    base = FakeBase(width=4)
    cache = plan_cache(data_set, base, configure(tmp_path, size=128, **added))
    expected = measure_cache(cache, base)
    fill_cache(cache, base)
    stored = [path for path in cache.folder.glob("*.safetensors")]
    tensors = [t for path in stored for t in module.read_safetensors(path)[0].values()]
    assert expected == sum(t.nbytes for t in tensors)
    assert "takes 0.0 GiB" in check_disk(cache, base)


def test_a_disk_without_room_is_refused(tmp_path, data_set, monkeypatch):
    cache = plan_cache(data_set, FakeBase(), configure(tmp_path))
    usage = module.shutil.disk_usage(tmp_path)
    for free, fits in ((10**6, True), (1000, False)):
        monkeypatch.setattr(
            module.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free)
        )
        if fits:
            check_disk(cache, FakeBase())
        else:
            words = sentence(check_disk, cache, FakeBase())
            assert "0.0 GiB are free" in words and "views below 2" in words
