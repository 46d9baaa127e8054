"""Subject masks of paper dolls: good ones from the bundled base, and the measurement's output."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from retrieval_core.paperdoll.backgrounds import draw_background
from retrieval_core.paperdoll.batches import to_images
from retrieval_core.paperdoll.bundle import BASE_FILE, find_bundled
from retrieval_core.paperdoll.cases import make_character_case, prepare_rendering
from retrieval_core.paperdoll.measure_subject_masks import compute_iou, find_masks, main, mask_case
from retrieval_core.paperdoll.model import load_base
from retrieval_core.training_free import TrainingFree

COUNT = 6


@pytest.fixture(scope="module")
def base():
    return load_base(find_bundled(BASE_FILE))


@pytest.fixture(scope="module")
def network(base):
    return TrainingFree(base.unet.config, "paperdoll", "")


@pytest.fixture(scope="module")
def cases():
    return [make_character_case(9, i) for i in range(COUNT)]


def test_figures_before_a_background_are_found(base, network, cases):
    found = find_masks(base, network, [r for case in cases for r in case.references])
    truths = [torch.from_numpy(source.mask) for case in cases for source in case.sources]
    assert all(mask is not None for mask in found)
    assert compute_iou(torch.stack(found), torch.stack(truths)).mean() > 0.84


def test_most_backgrounds_and_close_crops_get_no_mask(base, network, cases):
    empty = to_images(np.stack([draw_background("sky", i) for i in range(4)]))
    crops = torch.stack([case.references[0].image[:, 24:32, 28:36] for case in cases])
    crops = torch.nn.functional.interpolate(crops, (64, 64), mode="bilinear")
    like = prepare_rendering(cases[0].sources[0], "figure")
    references = [replace(like, image=image) for image in torch.cat([empty, crops])]
    found = find_masks(base, network, references)
    assert sum(mask is None for mask in found) >= 7


def test_a_case_gets_masks_and_is_grey_outside_them(base, network, cases):
    masked = mask_case(base, network, cases[0])
    for before, after in zip(cases[0].references, masked.references, strict=True):
        inside = after.mask > 0
        assert before.mask is None and inside.any() and not inside.all()
        assert torch.equal(before.image[:, inside], after.image[:, inside])
        assert (after.image[:, ~inside] - 0.5).abs().max() < 0.01


def test_the_measurement_prints_masks_time_and_leak(capsys):
    assert main(["--count", "1", "--seed", "5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["references"] == 4 and 0.7 < result["IoU"] <= 1
    assert result["time"]["of an encoding, percent"] > 0
    for line in ("without retrieval", "without masks", "masks found", "true masks"):
        assert 0 <= result[line]["reference background"] <= 100
    assert main(["--count", "1", "--no-pictures", "--json"]) == 0
    assert "masks found" not in json.loads(capsys.readouterr().out)
