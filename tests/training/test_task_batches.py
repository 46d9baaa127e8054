"""Items and batches of both tasks: what is drawn, in which order, and how fast it is read."""

import time

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")
from cached_data_set import ROWS, FakeBase, configure, embed_text, write_pictures

from retrieval_core.training.correspondence import UNKNOWN
from retrieval_core.training.latent_cache import fill_cache, plan_cache
from retrieval_core.training.task_batches import (
    Batch,
    TaskItems,
    collate_items,
    make_loader,
    make_sampler,
)


@pytest.fixture
def data_set(tmp_path):
    return write_pictures(tmp_path)


@pytest.fixture
def make_items(tmp_path, data_set):
    """Items of a configuration with the changes given."""

    def make(base=None, **changes):
        base, config = base or FakeBase(), configure(tmp_path, **changes)
        cache = plan_cache(data_set, base, config)
        fill_cache(cache, base)
        return TaskItems(cache, config)

    return make


def find_concepts(item):
    texts = {text: embed_text(text) for text in ("figure", "face", "clothes")}
    return [
        next(text for text, wanted in texts.items() if (context == wanted).all())
        for context in item["reference_context"]
    ]


def number_rows(item):
    return [int(name.split(".")[0]) for name in item["names"]]


def read_epochs(items, count):
    return [items[number] for number in range(count * len(items))]


def test_references_share_what_the_task_wants_and_are_never_the_target(make_items):
    drawn = {}
    for item in read_epochs(make_items(composition_share=0.5), 40):
        target, *references = number_rows(item)
        assert target not in references and len(references) == 4
        concepts = find_concepts(item)
        assert concepts in (["figure"] * 4, ["face"] * 2 + ["clothes"] * 2)
        for concept, reference in zip(concepts, references):
            drawn.setdefault((concept, target), set()).add(reference)
    # Figures and clothes: the same outfit. Faces: any outfit, known or not, of the same artist.
    assert drawn["figure", 0] == {1, 2, 3} and drawn["figure", 4] == {5}
    assert drawn["clothes", 1] == {2, 3} and drawn["face", 1] == {2, 3, 4, 5, 8}
    assert drawn["face", 4] == {1, 2, 3, 5, 8} and drawn["clothes", 4] == {5}


def test_tensors_of_an_item_are_those_of_its_pictures(make_items):
    items = make_items(text_drop=0.0, reference_drop=0.0, remove_background=0.0, views=1)
    for item in read_epochs(items, 2):
        target, *references = number_rows(item)
        torch.testing.assert_close(item["latents"][0], torch.full((4, 8, 8), grey(target)).half())
        assert (item["context"][0] == embed_text(f"tag {target}")).all()
        assert (item["content"][0] == 1).all()
        assert item["face"][0].sum() == (16 if ROWS[target][3] else 0)
        for latent, mask, row in zip(
            item["reference_latents"], item["reference_masks"], references
        ):
            inside = latent[:, mask]
            torch.testing.assert_close(inside, torch.full_like(inside, grey(row)))


def grey(row):
    return (20 * row + 10) / 127.5 - 1


def test_dropped_text_is_the_empty_prompt_and_dropped_references_are_zero(make_items):
    items = make_items(text_drop=0.5, reference_drop=0.3)
    read = read_epochs(items, 100)
    empty = [bool((item["context"][0] == embed_text("")).all()) for item in read]
    dropped = [not item["used"].any() for item in read]
    for item, without in zip(read, dropped):
        assert bool(item["used"].all()) != without
        assert any(latent.any() for latent in item["reference_latents"]) != without
    assert abs(np.mean(empty) - 0.5) < 0.07 and abs(np.mean(dropped) - 0.3) < 0.07
    assert abs(np.mean(np.logical_and(empty, dropped)) - 0.15) < 0.05  # independent


def test_backgrounds_are_removed_with_the_probability_asked_for(make_items):
    """Rows 0 and 2 have masks of their left halves; views are as they are, so that masks tell."""
    items = make_items(task="same character", remove_background=0.3, views=1, reference_drop=0.0)
    removed, shown, mixed = [], [], 0
    for item in read_epochs(items, 60):
        masks = list(zip(number_rows(item)[1:], item["reference_masks"]))
        masked = [not mask.all() for row, mask in masks if ROWS[row][4]]
        mixed += len(set(masked)) == 2
        removed += masked
        shown += [bool(mask.all()) for row, mask in masks if not ROWS[row][4]]
    assert abs(np.mean(removed) - 0.3) < 0.07 and all(shown)
    assert mixed  # drawn for each reference


@pytest.mark.parametrize("task, share", [("both", 0.25), ("composition", 0.25)])
def test_compositions_have_their_share(make_items, task, share):
    items = make_items(task=task, composition_share=share)
    kinds = [find_concepts(item)[0] for item in read_epochs(items, 70)]
    wanted = share if task == "both" else 1.0
    assert abs(np.mean([kind == "face" for kind in kinds]) - wanted) < 0.07


def test_every_view_of_targets_is_drawn(make_items):
    items = make_items(views=3, task="same character")
    # In the mapped file.
    entries = {item["latents"][0].data_ptr() for item in read_epochs(items, 30)}
    assert len(entries) == 3 * len(items)


def test_an_epoch_has_every_target_once_in_an_order_of_its_own(make_items):
    items = make_items()
    orders = [
        [number_rows(items[e * len(items) + i])[0] for i in range(len(items))] for e in range(3)
    ]
    assert all(sorted(order) == [0, 1, 2, 3, 4, 5] for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_an_item_depends_on_its_number_only(make_items):
    items = make_items()
    wanted = {n: items[n] for n in (17, 3, 40)}
    again = make_items()
    for number in (40, 3, 17):
        assert_same(collate_items([again[number]]), collate_items([wanted[number]]))
    other = make_items(seed=4)
    assert number_rows(other[17]) + number_rows(other[3]) != (
        number_rows(wanted[17]) + number_rows(wanted[3])
    )


def test_targets_that_share_references_are_of_one_outfit_and_none_is_a_reference(make_items):
    items = make_items(targets=3, references=2, text_drop=0.5, reference_drop=0.0)
    firsts, others, drops = set(), set(), set()
    for number, item in enumerate(read_epochs(items, 20)):
        targets, references = number_rows(item)[:3], number_rows(item)[3:]
        assert not set(targets) & set(references)
        assert len({ROWS[row][:3] for row in targets}) == 1
        for row, latent in zip(targets, item["latents"]):
            assert latent.median() == torch.full((1,), grey(row)).half()
        assert torch.stack(item["numbers"]).tolist() == [3 * number + i for i in range(3)]
        firsts.add(targets[0])
        others |= set(targets[1:])
        drops.add(tuple(bool((one == embed_text("")).all()) for one in item["context"]))
    assert firsts == others == set(range(6)) and len(drops) == 8
    batch = collate_items([items[0], items[1]])
    assert batch.latents.shape == (6, 4, 8, 8) and batch.used.shape == (2, 2)
    assert batch.reference_latents.shape == (2, 2, 4, 8, 8) and len(batch.names) == 2


def test_targets_whose_references_lack_part_labels_are_unknown(tmp_path):
    data_set = write_pictures(tmp_path, labelled=(0, 1, 2))
    config = configure(tmp_path, task="same character", part_weight=1.0, references=1)
    cache = plan_cache(data_set, FakeBase(), config)
    fill_cache(cache, FakeBase())
    items = TaskItems(cache, config)
    seen = set()
    for item in read_epochs(items, 20):
        target, reference = number_rows(item)
        known = bool((item["parts"][0] != UNKNOWN).all())
        assert known == (target < 3 and reference < 3)
        seen.add((target < 3, known))
    assert seen == {(True, True), (True, False), (False, False)}
    batch = collate_items([items[0], items[1]])
    assert batch.parts.shape == (2, 16, 16) and batch.reference_parts.shape == (2, 1, 16, 16)


def assert_same(one, other):
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(other, name)), name
        else:
            assert value == getattr(other, name), name


def test_two_processes_take_the_passes_of_one_that_accumulates(tmp_path):
    alone = configure(tmp_path, steps=5, accumulate=4, batch_size=3)
    shared = configure(tmp_path, steps=5, accumulate=2, batch_size=3)
    passes = make_sampler(alone, 0, 1)
    assert [number for one in passes for number in one] == list(range(5 * 4 * 3))
    ranks = [make_sampler(shared, rank, 2) for rank in (0, 1)]
    assert [one for both in zip(*ranks) for one in both] == passes


def test_a_resumed_run_goes_on_with_the_next_step(tmp_path):
    config = configure(tmp_path, steps=9, accumulate=2)
    for rank in (0, 1):
        whole = make_sampler(config, rank, 2)
        assert make_sampler(config, rank, 2, start=4) == whole[4 * 2 :]


@pytest.mark.parametrize("width", [None, 3])
def test_workers_read_the_same_batches(tmp_path, make_items, width):
    items = make_items(FakeBase(width), steps=4)
    sampler = make_sampler(items.config, 0, 1)
    wanted = [collate_items([items[number] for number in one]) for one in sampler]
    config = configure(tmp_path, steps=4, workers=2)
    read = list(make_loader(items.cache, config))
    assert len(read) == 4
    for one, other in zip(read, wanted):
        assert_same(one, other)
    first = read[0]
    assert first.latents.shape == (2, 4, 8, 8) and first.face.shape == (2, 1, 8, 8)
    assert first.reference_latents.shape == (2, 4, 4, 8, 8) and first.used.shape == (2, 4)
    assert first.reference_context.shape == (2, 4, 4, 8) and first.numbers.tolist() == [0, 1]
    assert first.reference_masks.shape == (2, 4, 8, 8) and len(first.names[1]) == 5
    if width is None:
        assert first.y is None and first.reference_y is None
    else:
        assert first.y.shape == (2, 3) and first.reference_y.shape == (2, 4, 3)


def test_only_floating_point_tensors_change_their_type(make_items):
    items = make_items()
    batch = collate_items([items[0]]).to("cpu", torch.bfloat16)
    assert isinstance(batch, Batch) and batch.latents.dtype == batch.face.dtype == torch.bfloat16
    assert batch.used.dtype == torch.bool and batch.numbers.dtype == torch.int64
    assert batch.y is None and len(batch.names[0]) == 5


LARGE = {"steps": 60, "workers": 2, "batch_size": 8, "size": 512, "views": 1}


def test_a_batch_costs_a_worker_little_processor_time(make_items):
    """Processor time, which other programs do not change much, of 8 items at SD 1.5's sizes."""
    items = make_items(LargeBase(), **LARGE)
    taken = []
    for _ in range(20):
        start = time.process_time()
        batch = collate_items([items[i] for i in range(8)])
        taken.append(time.process_time() - start)
    assert batch.context.shape == (8, 77, 768)
    print(f"{min(taken) * 1e3:.2f} ms of processor time to read a batch")
    assert min(taken) < 0.012


@pytest.mark.slow
def test_reading_keeps_up_with_a_batch_in_memory(make_items):
    """Wall clock of steps of 0.1 s, with two workers; for a machine with nothing else to do."""
    items = make_items(LargeBase(), **LARGE)
    loader = iter(make_loader(items.cache, items.config))
    held = next(loader)
    assert held.latents.shape == (8, 4, 64, 64) and held.context.shape == (8, 77, 768)

    def measure(batches):
        start = time.perf_counter()
        for batch in batches:
            batch.to("cpu", torch.float32)
            time.sleep(0.1)  # a step on an accelerator, which leaves the CPU idle
        return time.perf_counter() - start

    in_memory = measure(held for _ in range(25))
    ratio = in_memory / measure(next(loader) for _ in range(25))
    print(f"{ratio:.3f} of the throughput of a batch in memory")
    assert ratio > 0.9


class LargeBase(FakeBase):
    """Latents and contexts of the size of SD 1.5's."""

    def encode_prompts(self, texts, sizes):
        return torch.zeros(len(texts), 77, 768), None
