"""Cost of a sampling step relative to the base model's, all variants interleaved in one run.

`python -m tests.benchmarks.step_cost` with the Python of a ComfyUI; see `--help`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import torch

from retrieval_core.bank.token_budget import AUTOMATIC, Budget, choose_budgets
from retrieval_core.network.unet import UNetConfig
from tests.conftest import no_host_line

from . import arithmetic, hosting, table
from .timing import BASE, Sample, interleave, keep_heap, timed
from .variants import Run, Variant, Workbench, variants

QUICK_SIZE = 128
QUICK_COUNTS, COUNTS = (1, 4), (1, 4, 16, 64)
CFG = 7.0
WARM_EDGE = 8
BANK_OF = 4
PASSES = 3  # for one step measured: a pass of the encoder is short beside it
CACHED_BYTES = 512 << 20


class Refused(ValueError):
    """A mistake of the user's in one sentence."""


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.step_cost", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SIZE} pixels, fewer variants")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--base", choices=hosting.BASES, default="sd15")
    parser.add_argument("--size", type=int, help="edge of the picture in pixels (the base's own)")
    parser.add_argument("--rounds", type=int, default=3, help="steps measured of each variant")
    parser.add_argument("--references", type=int, nargs="+", help=f"their numbers {COUNTS}")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="KEY", help="e.g. 'trained-4-*'"
    )
    parser.add_argument("--list", action="store_true", help="prints the variants' keys and ends")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, though there is a GPU")
    options = parser.parse_args(given)
    if options.size is None:
        options.size = QUICK_SIZE if options.quick else hosting.BASES[options.base][2]
    options.references = options.references or (QUICK_COUNTS if options.quick else COUNTS)
    if options.size < 64 or options.size % 64:
        raise Refused(f"The size is {options.size} pixels; give a multiple of 64, at least 64.")
    if options.rounds < 1:
        raise Refused(f"Measuring {options.rounds} rounds is not possible; give 1 or more.")
    if min(options.references) < 1:
        raise Refused(
            f"The numbers of references are {list(options.references)}; give 1 or more each."
        )
    return options


def chosen(found: Sequence[Variant], patterns: Sequence[str]) -> list[Variant]:
    """Variants whose key matches a pattern; Refused if a pattern matches none."""
    for pattern in patterns:
        if not any(fnmatch(variant.key, pattern) for variant in found):
            raise Refused(
                f"No variant is called '{pattern}'; choose of "
                f"{', '.join(variant.key for variant in found)}."
            )
    return [v for v in found if any(fnmatch(v.key, pattern) for pattern in patterns)]


def step(run: Run, size: int) -> Sample:
    """Times one guided evaluation of the model in the middle of sampling, in the host's sampler."""
    import comfy.sample
    import comfy.samplers

    model, edge = run.model, size // 8
    taken: list[Sample] = []

    def sampler(denoise: Any, x: Any, sigmas: Any, extra_args: dict, **_: Any) -> Any:
        sigma = sigmas[:1].expand(x.shape[0])
        # A warm-up call keeps one-time work (moving banks, shaping weights) out of the step; on a
        # CPU a tiny picture is enough.
        warm = x if x.device.type == "cuda" else x[..., :WARM_EDGE, :WARM_EDGE]
        denoise(warm, sigma, **extra_args)
        taken.append(timed(lambda: denoise(x, sigma, **extra_args), x.device))
        return x

    level = model.get_model_object("model_sampling").percent_to_sigma(0.4)
    noise = torch.randn(1, 4, edge, edge, generator=torch.Generator().manual_seed(5))
    comfy.sample.sample_custom(
        model,
        noise,
        CFG,
        comfy.samplers.KSAMPLER(sampler),
        torch.tensor([float(level), 0.0]),
        run.positive,
        run.negative,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=5,
    )
    return taken[0]


def try_variants(found: Sequence[Variant]) -> None:
    """Runs other packs' variants on a tiny picture, so that a broken checkout fails early."""
    for variant in found:
        try:
            step(variant.make(), 64)
        except Exception as error:  # another pack's code: of any type
            raise Refused(
                f"{variant.title} failed ({type(error).__name__}: {error}); use a checkout that "
                "works with this ComfyUI, or unset the variable that names it."
            ) from error


class _Reached(Exception):
    """Ends a pass of the U-Net after its encoder."""


def prepare(bench: Workbench, rounds: int) -> list[dict[str, Any]]:
    """Costs before sampling, as ratios to one row through the base U-Net's encoder.

    A bank's floor counts the projections of the merged tokens, not the merging.
    """
    import comfy.model_management as management
    from retrieval_pack.nodes.host.encoded_references import References
    from retrieval_pack.retrieval_core.bank.encoding import encode_references

    network, config = bench.network, bench.config
    hosting.randomise(network.network.encoder)
    management.load_models_gpu([bench.model, network.encoder, network.sites])
    device, kind = network.encoder.load_device, network.compute_dtype
    unet = bench.model.model.diffusion_model
    latent = torch.randn(1, 4, bench.latent, bench.latent).to(device, kind)
    context = bench.positive[0][0].to(device, kind)
    y = None
    if bench.config.adm_in_channels is not None:
        y = torch.zeros(1, bench.config.adm_in_channels, device=device, dtype=kind)
    steps = torch.zeros(1, device=device)
    encoded = bench.references(BANK_OF).encoded

    def reached(*_: Any) -> None:
        raise _Reached

    def run_encoder() -> None:
        handle = unet.middle_block[-1].register_forward_hook(reached)
        try:
            unet(latent, steps, context=context, y=y, transformer_options={})
        except _Reached:
            pass
        finally:
            handle.remove()

    def make_bank(budget: Budget) -> Any:
        return References(network, encoded).bank(budget)

    encoder = arithmetic.encoder_operations(config, 1, bench.latent, bench.latent)

    def compute_floor(budget: Budget) -> float:
        grid = arithmetic.positions(config, bench.latent, bench.latent)
        size = (bench.latent, bench.latent)
        budgets = choose_budgets(budget, config.site_downsampling(), size)
        left = {s: min(BANK_OF * n, budgets[s] or BANK_OF * n) for s, n in grid.items()}
        return arithmetic.projection_operations(config, left) / encoder

    works = {
        "encoding one reference": (
            lambda: encode_references(network.network, latent, context, y),
            1.0,
        ),
        f"making the bank of {BANK_OF}, default budget": (
            lambda: make_bank(AUTOMATIC),
            compute_floor(AUTOMATIC),
        ),
        f"making the bank of {BANK_OF}, all tokens": (
            lambda: make_bank(None),
            compute_floor(None),
        ),
    }
    calls = {BASE: run_encoder, **{title: work for title, (work, _) in works.items()}}
    for call in calls.values():
        call()
    series = {}
    for title in works:  # one by one, so that none is disturbed by the others' memory
        found = interleave([title], lambda name: timed(calls[name], device), PASSES * rounds)
        series[title] = found[title]
    return [table.once(title, series[title], floor) for title, (_, floor) in works.items()]


def measure(
    options: argparse.Namespace, show: bool, config: UNetConfig | None = None
) -> dict[str, Any]:
    """Everything measured, as one JSON-able object. config: a U-Net of another shape."""
    import comfy.model_management as management

    called, own, _ = hosting.BASES[options.base]
    config = config or own
    bench = Workbench(hosting.base_model(config), config, options.size)
    picked = {v.key: v for v in chosen(variants(bench, options.references), options.only)}
    about: dict[str, tuple[int | None, int]] = {BASE: (0, 0)}
    cached = {BASE: Run(bench.model, bench.positive, bench.negative)}
    rows: list[int] = []
    handle = bench.model.model.diffusion_model.register_forward_pre_hook(
        lambda _, inputs: rows.append(inputs[0].shape[0])
    )

    def get_run(key: str) -> Run:
        """A cached run; those with large banks are made for each step, to save memory."""
        run = cached.get(key) or picked[key].make()
        about[key] = (run.added, run.bank_bytes)
        if run.bank_bytes < CACHED_BYTES:
            cached[key] = run
        return run

    def progress(name: str, done: int, total: int) -> None:
        if show:
            print(f"\r{done}/{total} {name:40}", end="", file=sys.stderr, flush=True)

    with torch.inference_mode():
        try_variants([variant for variant in picked.values() if variant.external])
        step(cached[BASE], options.size)  # loads the model, and warms the machine up
        series = interleave(
            list(picked), lambda key: step(get_run(key), options.size), options.rounds, progress
        )
        handle.remove()
        once = prepare(bench, options.rounds)
    if show:
        print(file=sys.stderr)
    base = arithmetic.base_operations(config, 2, bench.latent, bench.latent)
    device = management.get_torch_device()
    return {
        "host": f"ComfyUI {hosting.host_version()}",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(bench.model.model.get_dtype()).removeprefix("torch."),
        "base": f"{called}, random weights",
        "dynamic VRAM": getattr(bench.model, "is_dynamic", bool)(),  # 0.8.0 lacks it
        "pixels": options.size,
        "rounds": options.rounds,
        "rows a call": sorted(set(rows)),
        "base operations a step": base,
        "memory": "the allocator's peak"
        if device.type == "cuda"
        else "the process's resident peak",
        "steps": [
            table.entry(key, picked[key].title if key in picked else key, one, *about[key], base)
            for key, one in series.items()
        ],
        "once": once,
    }


def start_host(cpu: bool) -> None:
    """Starts ComfyUI; Refused if there is none."""
    missing = no_host_line()
    if missing is not None:
        raise Refused(missing.replace("Host tests (tests/host) skipped", "It needs ComfyUI"))
    keep_heap()
    hosting.start(cpu)


def main(given: Sequence[str] | None = None) -> int:
    try:
        options = arguments(given)
        bench = Workbench(None, hosting.BASES[options.base][1], options.size)
        found = chosen(variants(bench, options.references), options.only)
        if options.list:
            print("\n".join(variant.key for variant in found))
            return 0
        start_host(options.cpu)
        result = measure(options, show=not options.json and sys.stderr.isatty())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    print(json.dumps(result) if options.json else table.text(result))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
