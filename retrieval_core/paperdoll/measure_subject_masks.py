"""Measures the subject masks of the training-free mode: see `main` for the command.

References are figures of held-out characters with their background, whose true masks are known.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..bank.encoding import split_features
from ..data.prepare import PreparedReference, keep_subject
from ..training_free import TrainingFree, record
from ..training_free.subject_mask import LEAST_COVERED, find_subjects
from .bundle import BASE_FILE, JUDGE_FILE, find_bundled
from .cases import Case, make_character_case
from .generate import Sampling
from .judge import compute_chance, load_judge
from .measure import (
    draw_in_batches,
    make_parser,
    measure_following,
    measure_leak,
    measure_matches,
    print_result,
    to_percent,
)
from .measure_training_free import generate_pictures
from .model import PaperdollModel, load_base

ENOUGH = 0.85
TIMED = 40


def compute_iou(masks: Tensor, truths: Tensor) -> Tensor:
    """Intersection over union of masks [N, H, W], both bool: [N]."""
    both, either = (masks & truths).sum((1, 2)), (masks | truths).sum((1, 2))
    return both / either.clamp_min(1)


def find_masks(
    base: PaperdollModel, network: TrainingFree, references: Sequence[PreparedReference]
) -> list[Tensor | None]:
    """Subject masks of references, from one encoding of all."""
    images = torch.stack([reference.image for reference in references])
    with torch.inference_mode():
        latents = base.vae.encode(images)
        context = base.text.encode([reference.concept for reference in references])
        features = record(base.unet, base.schedule, network, latents, context)
        return find_subjects(features, images, [reference.mask for reference in references])


def mask_case(base: PaperdollModel, network: TrainingFree, case: Case) -> Case:
    """The case with the subject masks found, grey outside them."""
    masks = find_masks(base, network, case.references)
    pairs = zip(case.references, masks, strict=True)
    references = [
        reference if mask is None else keep_subject(reference, mask) for reference, mask in pairs
    ]
    return replace(case, references=references)


def measure_time(
    base: PaperdollModel, network: TrainingFree, references: Sequence[PreparedReference]
) -> dict[str, float]:
    """Milliseconds of encoding a reference, and of finding its subject; medians."""
    encoding, finding = [], []
    with torch.inference_mode():
        for reference in references:
            start = time.perf_counter()
            images = reference.image[None]
            latents = base.vae.encode(images)
            context = base.text.encode([reference.concept])
            features = record(base.unet, base.schedule, network, latents, context)
            split_features(features, latents.shape[2:], [None])
            middle = time.perf_counter()
            find_subjects(features, images, [None])
            encoding.append(middle - start)
            finding.append(time.perf_counter() - middle)
    ratio = median(f / e for f, e in zip(finding, encoding))
    return {
        "encoding, ms": round(1000 * median(encoding), 2),
        "finding the subject, ms": round(1000 * median(finding), 2),
        "of an encoding, percent": round(100 * ratio, 1),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The measurement that the command line asks for, as one JSON-able dict."""
    base = load_base(find_bundled(BASE_FILE, options.weights))
    judge = load_judge(find_bundled(JUDGE_FILE, options.weights))
    network = TrainingFree(base.unet.config, "paperdoll", "")
    cases = [make_character_case(options.seed, i) for i in range(options.count)]
    found = [mask_case(base, network, case) for case in cases]
    whole = torch.ones_like(cases[0].references[0].image[0])
    masks = [whole if r.mask is None else r.mask for case in found for r in case.references]
    truths = [torch.from_numpy(source.mask) for case in cases for source in case.sources]
    iou = compute_iou(torch.stack(masks) > 0, torch.stack(truths))
    references = [reference for case in cases for reference in case.references]
    result: dict[str, Any] = {
        "references": len(references),
        "seed": options.seed,
        "IoU": round(float(iou.mean()), 3),
        f"IoU of {ENOUGH} or more, percent": to_percent((iou >= ENOUGH).tolist()),
        "no subject found, percent": to_percent(
            [r.mask is None for case in found for r in case.references]
        ),
        "time": measure_time(base, network, references[:TIMED]),
        "chance of the references' background": round(100 * compute_chance("background"), 1),
    }

    def add_line(name: str, shown: Sequence[Case], **setting: Any) -> None:
        draw = partial(generate_pictures, base, how=Sampling(), **setting)
        read = judge.read(draw_in_batches(base, options.seed, shown, draw, name))
        result[name] = {
            "attribute match": measure_matches(shown, read)["mean"],
            "text followed": measure_following(shown, read),
            "reference background": measure_leak(shown, read),
        }

    if not options.no_pictures:
        add_line("without retrieval", cases)
        add_line("without masks", cases, network=network)
        add_line("masks found", found, network=network, least=LEAST_COVERED)
        masked = [make_character_case(options.seed, i, masked=True) for i in range(options.count)]
        add_line("true masks", masked, network=network)
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("measure_subject_masks", 200)
    parser.add_argument("--no-pictures", action="store_true", help="masks and time only")
    options = parser.parse_args(arguments)
    return print_result(options, lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
