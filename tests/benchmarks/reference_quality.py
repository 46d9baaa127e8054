"""The training-free mode beside Advanced-ControlNet's reference modes on paper dolls, in the host.

`python -m tests.benchmarks.reference_quality` with the Python of a ComfyUI; see `--help`. Match,
text following and leak as in `retrieval_core.paperdoll.measure_training_free`, of the same
characters, prompts, noise and steps, so that its rows and these can be compared. The other pack is
the checkout that ADVANCED_CONTROLNET_PATH names; without one there are only this pack's rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from torch import Tensor

from retrieval_core.paperdoll.bundle import BASE_FILE, JUDGE_FILE, find_bundled
from retrieval_core.paperdoll.cases import Case, make_character_case
from retrieval_core.paperdoll.generate import Sampling, draw_noise
from retrieval_core.paperdoll.judge import load_judge
from retrieval_core.paperdoll.measure import (
    make_parser,
    measure_following,
    measure_leak,
    measure_matches,
    print_result,
)
from retrieval_core.paperdoll.model import load_base

from . import external, hosting
from .step_cost import start_host

KINDS, FIDELITIES = ("reference_attn", "reference_attn+adain"), (0.5, 1.0)
BASE, OURS = "without references", "training-free"

Draw = Callable[[Sequence[Case], Tensor], Tensor]


class Dolls:
    """A paper-doll base model in the host, and the ways of drawing figures that are compared."""

    def __init__(self, options: argparse.Namespace):
        from retrieval_pack.nodes.host import paperdoll_host

        path = find_bundled(BASE_FILE, options.weights)
        self.base = load_base(path)
        self.model = paperdoll_host.load_model(path)
        self.clip, self.vae = (
            paperdoll_host.make_clip(self.base),
            paperdoll_host.HostVAE(self.base.vae),
        )
        self.how = Sampling(options.steps, options.cfg)

    def plain(self, cases: Sequence[Case], noise: Tensor) -> Tensor:
        """Figures of the base model."""
        return self._sample(self.model, *self._read_prompts(cases), noise)

    def ours(self, count: int, cases: Sequence[Case], noise: Tensor) -> Tensor:
        """Figures with `count` references in this pack's training-free mode, by its defaults."""
        from retrieval_pack.nodes.host import encoded_references as host
        from retrieval_pack.nodes.host.apply import apply_references
        from retrieval_pack.nodes.host.training_free_model import use_training_free

        network, pictures = use_training_free(self.model), []
        for case, own in zip(cases, noise.split(1), strict=True):  # a batch shares its references
            given = case.references[:count]
            images = torch.stack([reference.image.movedim(0, -1) for reference in given])
            masks = [reference.mask for reference in given if reference.mask is not None]
            encoded = host.encode_references(
                network, images, self.vae, self.clip, "figure", 1.0,
                torch.stack(masks) if masks else None,
            )  # fmt: skip
            model = apply_references(self.model, host.References(network, encoded), 1.0)
            pictures.append(self._sample(model, *self._read_prompts([case]), own))
        return torch.cat(pictures)

    def theirs(
        self, count: int, kind: str, fidelity: float, cases: Sequence[Case], noise: Tensor
    ) -> Tensor:
        """Figures with Advanced-ControlNet; several references are a chain of its ControlNets."""
        hints = [
            self.vae.encode(
                torch.stack([case.references[i].image.movedim(0, -1) for case in cases])
            )
            for i in range(count)
        ]
        texts = external.reference_only(*self._read_prompts(cases), hints, kind, fidelity)
        torch.manual_seed(0)  # it noises references with torch's own generator
        unet = self.model.model.diffusion_model
        with external.number_blocks_as_sd15(unet):
            return self._sample(self.model, *texts, noise)

    def _read_prompts(self, cases: Sequence[Case]) -> tuple[list, list]:
        """Conditionings of one row per figure."""

        def encode(prompt: str) -> Tensor:
            return self.clip.encode_from_tokens(self.clip.tokenize(prompt))

        positive = torch.cat([encode(case.prompt) for case in cases])
        return [[positive, {}]], [[encode("").expand_as(positive), {}]]

    def _sample(self, model: Any, positive: list, negative: list, noise: Tensor) -> Tensor:
        """Pictures [B, 3, 64, 64] by the core's steps in the host's sampler."""
        import comfy.sample
        import comfy.samplers

        schedule = self.base.schedule
        sigmas = schedule.sigmas()[schedule.timesteps(self.how.steps)].float()
        latents = comfy.sample.sample_custom(
            model, noise, self.how.cfg, comfy.samplers.sampler_object(self.how.sampler),
            torch.cat([sigmas, sigmas.new_zeros(1)]), positive, negative,
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip
        return self.vae.decode(latents).movedim(-1, 1)


def list_rows(dolls: Dolls, counts: Sequence[int]) -> dict[str, Draw]:
    """Name -> how its figures are drawn."""
    rows: dict[str, Draw] = {BASE: dolls.plain}
    for count in counts:
        suffix = f", {count} reference{'s' * (count > 1)}"
        rows[OURS + suffix] = partial(dolls.ours, count)
        if external.checkout(external.ADVANCED_CONTROLNET) is None:
            continue
        for kind in KINDS:
            for fidelity in FIDELITIES:
                name = f"Advanced-ControlNet {kind}, style fidelity {fidelity}{suffix}"
                rows[name] = partial(dolls.theirs, count, kind, fidelity)
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The measurement that the command line asks for, as one JSON-able dict."""
    dolls = Dolls(options)
    judge = load_judge(find_bundled(JUDGE_FILE, options.weights))
    masked = not options.unmasked
    cases = [make_character_case(options.seed, i, masked=masked) for i in range(options.count)]
    noise = torch.cat([draw_noise(dolls.base, options.seed, i) for i in range(options.count)])
    result: dict[str, Any] = {
        "host": f"ComfyUI {hosting.host_version()}",
        "figures": options.count,
        "seed": options.seed,
        "references masked": masked,
    }
    for name, draw in list_rows(dolls, options.references).items():
        if any(fnmatch(name, pattern) for pattern in options.only):
            with torch.inference_mode():
                found = judge.read(draw(cases, noise))
            result[name] = {
                "attribute match": measure_matches(cases, found),
                "text followed": measure_following(cases, found),
                "reference background": measure_leak(cases, found),
            }
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("", 100)
    parser.prog = "python -m tests.benchmarks.reference_quality"
    parser.add_argument("--references", type=int, nargs="+", default=[1], help="up to 4 each")
    parser.add_argument("--unmasked", action="store_true", help="references with background")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="rows' patterns")
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--cfg", type=float, default=Sampling.cfg)
    options = parser.parse_args(arguments)
    try:
        external.checkout(external.ADVANCED_CONTROLNET)
        start_host(cpu=True)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return print_result(options, lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
