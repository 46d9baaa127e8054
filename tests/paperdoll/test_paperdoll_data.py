"""Batches of the paper-doll world: who is in them, and that nothing decides but seed and step."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from retrieval_core.data import TaskOptions
from retrieval_core.paperdoll import batches as module
from retrieval_core.paperdoll.batches import (
    EACH,
    OTHER_CLOTHES,
    REFERENCES,
    SAME,
    TARGETS,
    BaseBatches,
    RetrievalBatches,
    render_character,
    render_characters,
    stack_images,
    to_images,
)
from retrieval_core.paperdoll.text import CONCEPTS, LENGTH, PAD, Tokenizer
from retrieval_core.paperdoll.world import is_held_out

COUNT = 6
# Nothing cut off, filled or moved: a whole figure as a reference is its picture.
PLAIN = TaskOptions(text_drop=0, reference_drop=0, remove_background=0)


def retrieval_batches(characters, size, seed):
    return RetrievalBatches(characters, size, seed, text_drop=0.5)


@pytest.fixture(scope="module")
def characters():
    return render_characters(3, COUNT)


def test_a_characters_figures_are_of_one_character_and_not_held_out():
    for index in range(20):
        figures = [rendering.figure for rendering in render_character(3, index)]
        assert len(figures) == EACH
        own, others_clothes = figures[:SAME], figures[SAME : SAME + OTHER_CLOTHES]
        people = figures[SAME + OTHER_CLOTHES :]
        who, clothes = figures[0].identity, figures[0].outfit
        assert all(f.identity == who and f.outfit == clothes for f in own)
        assert all(f.identity == who for f in others_clothes)
        assert all(f.outfit == clothes for f in people)
        for figure in figures:
            assert not is_held_out(figure.identity)
            assert not is_held_out(figure.outfit)


def test_rendering_on_all_processors_is_rendering_one_by_one(characters):
    for index in range(COUNT):
        for drawn, found in zip(render_character(3, index), characters[index], strict=True):
            assert np.array_equal(found.image, drawn.image)
            assert np.array_equal(found.mask, drawn.mask)
            assert np.array_equal(found.parts, drawn.parts)
            assert (found.head_box, found.figure) == (drawn.head_box, drawn.figure)


def test_batches_depend_on_seed_and_step_only(characters):
    for make in (BaseBatches, retrieval_batches):
        one, two, other = make(characters, 3, 5), make(characters, 3, 5), make(characters, 3, 6)
        one.batch(0)
        found = [tensors(batches.batch(7)) for batches in (one, two, other)]
        assert all(torch.equal(a, b) for a, b in zip(found[0], found[1]))
        assert not torch.equal(found[0][0], found[2][0])
        assert not torch.equal(found[0][0], tensors(one.batch(8))[0])


def tensors(batch):
    if isinstance(batch, tuple):
        return list(batch)
    return [getattr(batch, field.name) for field in fields(batch) if field.name != "paired"]


def test_shapes_are_those_that_training_takes(characters):
    batch = retrieval_batches(characters, 3, 0).batch(0)
    assert batch.targets.shape == (3 * TARGETS, 3, 64, 64)
    assert batch.ids.shape == (3 * TARGETS, LENGTH)
    assert batch.face.shape == (3 * TARGETS, 64, 64)
    assert batch.references.shape == (3 * REFERENCES, 3, 64, 64)
    assert batch.reference_ids.shape == (3 * REFERENCES, LENGTH)
    assert batch.masks.shape == (3 * REFERENCES, 64, 64) and batch.masks.dtype == torch.bool
    assert batch.used.shape == (3, REFERENCES) and batch.used.dtype == torch.bool
    assert 0 <= batch.targets.min() and batch.targets.max() <= 1
    assert batch.masks.flatten(1).any(1).all()
    images, ids = BaseBatches(characters, 5, 0).batch(0)
    assert images.shape == (5, 3, 64, 64) and ids.shape == (5, LENGTH)


def test_targets_are_of_the_character_and_never_among_its_references(characters, monkeypatch):
    monkeypatch.setattr(module, "TASK_OPTIONS", PLAIN)
    batches = retrieval_batches(characters, 3, 1)
    pictures = [stack_images(renderings) for renderings in characters]
    figure = Tokenizer().ids["figure"]
    tasks = set()

    def where(image):
        hits = [(i, j) for i in range(COUNT) for j in range(EACH) if image.equal(pictures[i][j])]
        return hits[0] if hits else None

    for step in range(6):
        batch = batches.batch(step)
        for group in range(3):
            targets = batch.targets[group * TARGETS : (group + 1) * TARGETS]
            shown = [where(target) for target in targets]
            (character,) = {index for index, _ in shown}
            assert len(set(shown)) == TARGETS and all(j < SAME for _, j in shown)
            rows = slice(group * REFERENCES, (group + 1) * REFERENCES)
            concepts = batch.reference_ids[rows, 0].tolist()
            assert (batch.reference_ids[rows, 1:] == PAD).all()
            if concepts == [figure] * REFERENCES:
                tasks.add("same character")
                sources = [where(image) for image in batch.references[rows]]
                assert all(index == character and j < SAME for index, j in sources)
                assert not set(sources) & set(shown) and len(set(sources)) == REFERENCES
            else:
                tasks.add("composition")
                names = [Tokenizer().words[i] for i in concepts]
                assert names == ["face", "face", "clothes", "clothes"]
                assert all(where(image) not in shown for image in batch.references[rows])
    assert tasks == {"same character", "composition"} and set(names) <= set(CONCEPTS)


def test_every_other_batch_shows_two_characters_in_one_scene(characters):
    """Half as many pictures, twice as wide; the halves share the background."""
    batches = BaseBatches(characters, 6, 4, pairs=True)
    alone, ids = batches.batch(2)
    assert torch.equal(alone, BaseBatches(characters, 6, 4).batch(2)[0])
    pictures, ids = batches.batch(3)
    assert pictures.shape == (3, 3, 64, 128) and ids.shape == (3, LENGTH)
    for picture in pictures:
        left, right = picture.chunk(2, -1)
        same = (left == right).all(0)
        assert same[:4].float().mean() > 0.5 and not same.all()  # the background's upper edge
    assert not torch.equal(pictures, batches.batch(5)[0])


def test_pairs_of_targets_share_their_scenes(characters, monkeypatch):
    monkeypatch.setattr(module, "TAG_DROP", 0.0)
    batches = RetrievalBatches(characters, 4, 1, text_drop=0.0, pairs=True)
    plain = RetrievalBatches(characters, 4, 1, text_drop=0.0)
    assert not batches.batch(2).paired and not plain.batch(3).paired
    assert torch.equal(batches.batch(2).targets, plain.batch(2).targets)
    batch = batches.batch(3)
    assert batch.paired
    ids = batch.ids.unflatten(0, (2, 2, TARGETS))
    assert torch.equal(ids[:, 0], ids[:, 1]) and not torch.equal(ids[0], ids[1])
    truths = batch.truths.unflatten(0, (4, TARGETS))
    known = {tuple(row) for row in plain.batch(3).truths.tolist()}
    for group in truths.tolist():  # one character a group, drawn anew in every target
        assert len({tuple(row) for row in group}) == 1
        assert tuple(group[0]) in known
    targets = batch.targets.unflatten(0, (4, TARGETS))
    assert not torch.equal(targets[0], targets[1])
    assert batch.face.flatten(1).any(1).all() and batch.target_parts.flatten(1).any(1).all()


def test_text_tags_and_references_are_dropped_as_often_as_said(characters):
    batches = RetrievalBatches(characters, 4, 2, text_drop=0.5)
    drawn = [batches.batch(step) for step in range(60)]
    ids = torch.cat([batch.ids for batch in drawn])
    used = torch.cat([batch.used for batch in drawn])
    silent = (ids == PAD).all(1)
    assert 0.43 < silent.float().mean() < 0.57
    assert 0.86 < (ids[~silent] != PAD).sum(1).float().mean() / 3 < 0.95
    counts = used.sum(1)
    assert (counts == REFERENCES).float().mean() == pytest.approx(0.8 * 0.95, abs=0.1)
    assert set(counts.tolist()) == {0, 1, 2, 3, 4}


def test_the_face_mask_is_the_targets_head_box(characters):
    batch = retrieval_batches(characters, 2, 4).batch(0)
    boxes = {rendering.head_box for renderings in characters for rendering in renderings}
    for face in batch.face:
        rows, columns = face.nonzero(as_tuple=True)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert tuple(int(edge) for edge in box) in boxes
        assert int(face.sum()) == (box[2] - box[0]) * (box[3] - box[1])


def test_images_are_channels_first_in_order():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), np.uint8)
    images = to_images(pixels)
    assert images.shape == (6, 3, 4, 5)
    assert float(images[4, 2, 1, 3]) == pytest.approx(pixels[1, 1, 1, 3, 2] / 255)
