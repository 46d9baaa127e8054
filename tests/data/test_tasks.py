"""Which references a target gets, and how targets and references are varied."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from retrieval_core.data import (
    RandomView,
    Sample,
    TaskOptions,
    draw_composition,
    draw_item,
    draw_same_character,
    open_data_set,
)
from retrieval_core.data import data_set as data_set_module
from retrieval_core.data.data_set import write_data_set
from retrieval_core.errors import RetrievalError

SIZE = 16
PLAIN = TaskOptions(size=SIZE, text_drop=0, reference_drop=0, remove_background=0)


def samples(count, head=True, height=SIZE):
    """Sample i has the colour (40 i + 10) above and (40 i + 20) in its lower half."""
    made = []
    for i in range(count):
        image = np.full((height, SIZE, 3), 40 * i + 10, np.uint8)
        image[height // 2 :] += 10
        box = (4, 0, 12, height // 2) if head else None
        made.append(Sample(image, np.ones((height, SIZE), bool), box, [f"tag {i}"]))
    return made


def source_of(reference):
    """Index of the sample that a reference shows, from its middle pixel."""
    return int(reference.image[SIZE // 2, SIZE // 2, 0]) // 40


def test_the_target_is_never_among_its_references():
    rng = np.random.default_rng(0)
    for task in (draw_same_character, draw_composition):
        seen = Counter()
        for _ in range(200):
            item = task(samples(6), 2, rng, PLAIN)
            assert item.target[0, 0, 0] == 90 and item.tags == ["tag 2"]
            indices = [source_of(r) for r in item.references]
            assert len(indices) == 4
            assert 2 not in indices
            seen.update(indices)
        assert set(seen) == {0, 1, 3, 4, 5}
        assert max(seen.values()) < 1.5 * min(seen.values())


def test_same_character_draws_different_whole_figures():
    rng = np.random.default_rng(1)
    for _ in range(50):
        references = draw_same_character(samples(6), 0, rng, PLAIN).references
        assert len({source_of(r) for r in references}) == 4
        assert {r.concept for r in references} == {"figure"}


def test_composition_draws_two_faces_and_two_bodies_separately():
    rng = np.random.default_rng(2)
    alike = 0
    for _ in range(300):
        references = draw_composition(samples(6), 0, rng, PLAIN).references
        assert [r.concept for r in references] == ["face", "face", "clothes", "clothes"]
        faces, bodies = ([source_of(r) for r in references[a:b]] for a, b in ((0, 2), (2, 4)))
        assert len(set(faces)) == len(set(bodies)) == 2
        for r in references:  # a face shows no lower half, clothes no upper half
            wrong = 20 if r.concept == "face" else 10
            assert not (r.image == 40 * source_of(r) + wrong).all(-1).any()
        alike += set(faces) == set(bodies)
    # Separate draws of 2 from 5 are the same pair one time in ten.
    assert 10 <= alike <= 60


def test_pools_say_where_faces_and_bodies_may_come_from():
    rng = np.random.default_rng(3)
    for _ in range(50):
        item = draw_composition(
            samples(6), 0, rng, PLAIN, face_indices=[0, 1, 2], body_indices=[0, 4, 5]
        )
        indices = [source_of(r) for r in item.references]
        assert set(indices[:2]) == {1, 2} and set(indices[2:]) == {4, 5}
        item = draw_same_character(samples(6), 0, rng, PLAIN, indices=[0, 3], count=3)
        assert [source_of(r) for r in item.references] == [3, 3, 3]


def test_too_few_others_are_drawn_again_and_none_is_an_error():
    rng = np.random.default_rng(4)
    assert not draw_composition(samples(1), 0, rng, PLAIN, faces=0, bodies=0).references
    for task in (draw_same_character, draw_composition):
        assert [source_of(r) for r in task(samples(2), 1, rng, PLAIN).references] == [0] * 4
        with pytest.raises(RetrievalError, match="Sample 0 has no other sample to take a"):
            task(samples(1), 0, rng, PLAIN)
        with pytest.raises(RetrievalError, match="index is 5, and there are 2"):
            task(samples(2), 5, rng, PLAIN)
    with pytest.raises(RetrievalError, match="no other sample to take a face reference"):
        draw_composition(samples(3), 0, rng, PLAIN, face_indices=[0])
    with pytest.raises(RetrievalError, match="needs the head box"):
        draw_composition(samples(3, head=False), 0, rng, PLAIN)


def test_dropping_has_the_asked_rates():
    rng = np.random.default_rng(5)
    options = TaskOptions(size=SIZE, reference_drop=0.2, remove_background=0.7)
    items = [draw_same_character(samples(3), 0, rng, options) for _ in range(1500)]
    assert np.mean([not item.tags for item in items]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([not item.references for item in items]) == pytest.approx(0.2, abs=0.04)
    both = np.mean([not item.tags and not item.references for item in items])
    assert both == pytest.approx(0.1, abs=0.03)
    masks = [r.mask is not None for item in items for r in item.references]
    assert np.mean(masks) == pytest.approx(0.7, abs=0.03)


def test_the_same_generator_state_gives_the_same_item():
    options = TaskOptions(size=SIZE, source=RandomView((0.7, 1.2), 0.2, 0.5))
    first, second = (
        draw_composition(samples(6), 0, np.random.default_rng(7), options) for _ in range(2)
    )
    assert np.array_equal(first.target, second.target) and first.tags == second.tags
    for a, b in zip(first.references, second.references):
        assert np.array_equal(a.image, b.image)


def gradient_samples():
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[..., 0] = np.arange(SIZE) * 10
    return [Sample(image, None, (2, 2, 9, 9)) for _ in range(5)]


def test_source_and_target_are_varied_independently():
    varied = RandomView(flip=0.5)
    rng = np.random.default_rng(8)
    options = TaskOptions(size=SIZE, reference_drop=0, remove_background=0, source=varied,
                          target=varied)  # fmt: skip
    flips = []
    for _ in range(400):
        item = draw_same_character(gradient_samples(), 0, rng, options, count=2)
        images = [item.target, *(r.image for r in item.references)]
        flips.append([bool(image[0, 0, 0] > 0) for image in images])
    shares = Counter(tuple(row) for row in flips)
    # Three independent fair coins: each of the eight outcomes an eighth of the time.
    assert len(shares) == 8
    assert max(shares.values()) < 80 and min(shares.values()) > 25
    only_source = TaskOptions(size=SIZE, reference_drop=0, source=varied)
    only_target = TaskOptions(size=SIZE, reference_drop=0, remove_background=0, target=varied)
    for _ in range(30):
        item = draw_same_character(gradient_samples(), 0, rng, only_source)
        assert np.array_equal(item.target, gradient_samples()[0].image)
        item = draw_same_character(gradient_samples(), 0, rng, only_target)
        for r in item.references:
            assert np.array_equal(r.image, gradient_samples()[0].image)


def test_the_targets_masks_follow_its_geometry():
    image = np.full((2 * SIZE, SIZE, 3), 50, np.uint8)
    image[4:14, 3:11] = 250  # the head, and nothing else, is bright
    sample = Sample(image, None, (3, 4, 11, 14))
    options = TaskOptions(size=64, target=RandomView((0.5, 1.6), 0.3, 0.5), reference_drop=1)
    rng = np.random.default_rng(9)
    padded = 0
    for _ in range(300):
        item = draw_same_character([sample, sample], 0, rng, options)
        fill = item.target[~item.content]
        if len(fill):
            padded += 1
            assert (fill == fill[0]).all()
        grey = item.target[item.content]
        assert (grey == grey[:, :1]).all()  # nothing of a coloured padding inside
        bright = (item.target[..., 0] > 150) & item.content
        assert (item.face & ~item.content).sum() == 0
        differing = (bright != item.face).sum()
        around = 2 * (item.face.any(0).sum() + item.face.any(1).sum())
        assert differing <= max(around, 1)
    assert padded > 200


def test_a_square_target_without_padding_is_all_content():
    item = draw_same_character(samples(2, head=False), 0, np.random.default_rng(0), PLAIN)
    assert item.content.all() and not item.face.any()


def test_padding_colours_are_random():
    rng = np.random.default_rng(10)
    tall = samples(3, height=2 * SIZE)
    items = [draw_same_character(tall, 0, rng, PLAIN) for _ in range(20)]
    colours = {tuple(image[0, 0].tolist()) for item in items
               for image in (item.target, *(r.image for r in item.references))}  # fmt: skip
    assert len(colours) == 100


def test_random_views_stay_in_range():
    rng = np.random.default_rng(11)
    views = [RandomView((0.5, 2.0), 0.25, 0.3).draw(rng) for _ in range(4000)]
    scales = np.log2([view.scale for view in views])
    assert -1 <= scales.min() < -0.99 and 0.99 < scales.max() <= 1
    assert abs(scales.mean()) < 0.05
    shifts = np.array([view.shift for view in views])
    assert np.abs(shifts).max() <= 0.25 and np.abs(np.corrcoef(shifts.T)[0, 1]) < 0.05
    assert np.mean([view.flip for view in views]) == pytest.approx(0.3, abs=0.03)


def test_out_of_range_options_are_named():
    for make, words in (
        (lambda: RandomView((0, 1)), "view scale"),
        (lambda: RandomView((2, 1)), "view scale"),
        (lambda: RandomView(shift=2), "view shift is 2"),
        (lambda: RandomView(flip=-1), "flip probability is -1"),
        (lambda: TaskOptions(size=0), "image size is 0"),
        (lambda: TaskOptions(text_drop=1.5), "text_drop probability is 1.5"),
    ):
        with pytest.raises(RetrievalError, match=words):
            make()


# Character, artist, outfit, whether it has a head box: of the rows of `make_data_set`.
ROWS = [
    ("ann", "bob", 0, True), ("ann", "bob", 0, False), ("ann", "bob", 0, True),
    ("ann", "bob", 0, True), ("ann", "bob", 1, True), ("ann", "bob", 1, True),
    ("ann", "eve", 0, True), ("cid", "bob", 0, True), ("ann", "bob", -1, True),
]  # fmt: skip


@pytest.fixture
def data_set(tmp_path):
    """Row i is a picture of the colour of `samples(...)[i]`."""
    pa = pytest.importorskip("pyarrow")
    rows = []
    for i, (character, artist, outfit, head) in enumerate(ROWS):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (SIZE, SIZE), (20 * i + 10,) * 3).save(path)
        rows.append(
            {
                "root": str(tmp_path),
                "image": path.name,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "width": SIZE,
                "height": SIZE,
                "character": character,
                "artist": artist,
                "outfit": outfit,
                "tags": [f"tag {i}"],
                "head_box": [4, 0, 12, 8] if head else None,
                "mask": None,
                "parts": None,
                "source": "folders",
            }
        )
    write_data_set(tmp_path / "out", pa.Table.from_pylist(rows), {})
    return open_data_set(tmp_path / "out")


def test_references_from_a_data_set_share_what_the_task_wants(data_set):
    rng = np.random.default_rng(12)
    drawn = {"figure": set(), "face": set(), "clothes": set()}
    for task in ("same character", "composition"):
        for _ in range(60):
            item = draw_item(data_set, 0, task, rng, PLAIN)
            assert item.tags == ["tag 0"] and len(item.references) == 4
            for reference in item.references:
                drawn[reference.concept].add(int(reference.image[SIZE // 2, SIZE // 2, 0]) // 20)
    # Figures and clothes: the same outfit. Faces: any outfit, known or not, of the same artist.
    assert drawn == {"figure": {1, 2, 3}, "face": {2, 3, 4, 5, 8}, "clothes": {2, 3}}


def test_only_the_pictures_that_an_item_shows_are_opened(data_set, monkeypatch):
    opened = []
    load = data_set_module.load_image
    monkeypatch.setattr(data_set_module, "load_image", lambda p: opened.append(p.name) or load(p))
    rng = np.random.default_rng(13)
    for task in ("same character", "composition"):
        for target in data_set.find_targets(task).tolist():
            opened.clear()
            item = draw_item(data_set, target, task, rng, PLAIN)
            shown = {int(r.image[SIZE // 2, SIZE // 2, 0]) // 20 for r in item.references}
            assert sorted(opened) == sorted(f"{row}.png" for row in {target, *shown})
    dropped = TaskOptions(size=SIZE, reference_drop=1)
    opened.clear()
    assert not draw_item(data_set, 0, "composition", rng, dropped).references
    assert opened == ["0.png"]


def test_a_row_without_fellows_is_no_target(data_set):
    rng = np.random.default_rng(14)
    for task in ("same character", "composition"):
        targets = data_set.find_targets(task).tolist()
        assert targets == [0, 1, 2, 3, 4, 5]
        for row in set(range(len(ROWS))) - set(targets):
            with pytest.raises(RetrievalError, match="has no other sample"):
                draw_item(data_set, row, task, rng, PLAIN)
