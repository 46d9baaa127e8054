"""Trains a Retrieval ControlNet on a base model: from a data set to the network's file.

`train` tells the whole story. accelerate runs it on one device or many, in mixed precision, with
gradients accumulated over passes. What an item is and which noise it gets depend on the seed and
its number in the run alone (`TaskItems`, `draw_noise`), so that resumption and the number of
processes do not change the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.data_set import open_data_set
from ..errors import RetrievalError, import_library
from ..network.controlnet import NATIVE_SIZE, RetrievalControlNet
from .base_checkpoint import Base
from .cpu_average import CpuAverage
from .latent_cache import (
    LatentCache,
    check_disk,
    describe_targets,
    fill_cache,
    fingerprint_index,
    plan_cache,
    refuse_changed_data,
)
from .memory_estimate import check_memory
from .paper_objective import COPIED, PaperObjective, draw_noise
from .progress_sheet import ProgressSheet
from .run_config import RunConfig
from .run_folder import RunFolder
from .run_state import RunState
from .settings import scale_learning_rate
from .task_batches import make_loader
from .terminal import Terminal, Watcher

_TIMEOUT = timedelta(days=1)  # of waiting for another process, which may be filling its cache


def train(
    config: RunConfig, base: Base, accelerator: Any = None, watcher: Watcher | None = None
) -> Path | None:
    """Trains a network, or goes on with a run that was stopped.

    A stop (Ctrl-C, SIGTERM) finishes the current step and saves it, and the network as it is.

    Args:
        accelerator: accelerate's by default, or a `SingleDevice`.
        watcher: a `Terminal` by default.

    Returns:
        The network's file; None if the run was interrupted.

    Raises:
        RetrievalError: the device has too little memory, the folder holds another run, the data
            set was changed or has no targets, the disk is full, or a loss is not finite.
    """
    config = replace(config, size=config.size or NATIVE_SIZE[base.name])
    accelerator = accelerator or make_accelerator(config)
    device, schedule = accelerator.device, base.schedule
    rank, world = accelerator.process_index, accelerator.num_processes
    is_main = accelerator.is_main_process
    watcher = watcher or Terminal(config.out.name, is_main)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        accelerator.print(check_memory(config, base.unet.config, base.name, free, world))
    folder = RunFolder(config.out, config.keep_checkpoints)
    cache = plan_cache(open_data_set(config.data), base, config)
    accelerator.print(describe_targets(cache))
    describe_run(folder, config, base, cache, world, writes=False)  # refuses before hours of work
    complete_cache(cache, base, accelerator, watcher)
    describe_run(folder, config, base, cache, world, is_main)

    objective = make_objective(config, base).to(device)
    parameters = order_parameters(objective)
    optimizer = make_optimizer(parameters, config, world)
    model, optimizer = accelerator.prepare(objective, optimizer, device_placement=[False, False])
    averaged = parameters if is_main and config.ema_decay is not None else {}
    average = CpuAverage(averaged, config.ema_decay or 0.0)
    state = RunState(parameters, optimizer.optimizer, average, accelerator.scaler, world > 1)
    step = resume(folder, state, world)
    sheet = ProgressSheet(config, base, cache) if is_main and config.sheet_every else None

    passes: list[tuple[dict[str, Tensor], list[str]]] = []  # losses and targets of this step
    interrupted = False
    with watcher.follow(step, config.steps):
        for batch in make_loader(cache, config, rank, world, step):
            shape = batch.latents.shape[1:]
            noise = draw_noise(
                config.seed,
                batch.numbers,
                shape,
                schedule.steps,
                config.noise_offset,
                config.noise_power,
            )
            with accelerator.accumulate(model):
                batch = batch.to(device, torch.float32)
                losses = model(batch, *(t.to(device) for t in noise))
                accelerator.backward(losses["loss"])
                targets = [name for item in batch.names for name in item[: config.targets]]
                passes.append((losses, targets))
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(parameters.values(), config.clip_norm)
                    norm = float(norm)
                    measured, interrupted = measure_step(
                        accelerator, passes, norm, watcher.wants_stop, step
                    )
                    rate = set_learning_rate(optimizer, config, step)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            passes.clear()
            step += 1
            average.update(step, step == config.steps)
            accelerator.log({**measured, "grad_norm": norm, "learning_rate": rate}, step)
            watcher.update(step, measured)
            folder.raise_failure()
            if step % config.checkpoint_every == 0 or step == config.steps or interrupted:
                save(folder, state, step, is_main)
            if sheet is not None and (step % config.sheet_every == 0 or step == config.steps):
                with accelerator.autocast(), average.put_in_place():
                    path, scores = sheet.draw(objective, step)
                accelerator.log(scores, step)
                watcher.show_sheet(path)
            if interrupted:
                break
    folder.wait()
    accelerator.end_training()
    path = config.network or config.out / f"{config.out.resolve().name}.safetensors"
    if is_main:
        trained = average.choose() if config.ema_decay is not None else parameters
        write_network(path, objective, trained, step, config, base, cache)
        if step < config.steps:
            print(
                f"Training was interrupted after step {step} of {config.steps}; the same command "
                f"again goes on from '{config.out}'.",
                flush=True,
            )
    return path if step == config.steps else None


def make_accelerator(config: RunConfig) -> Any:
    """accelerate's entry point, of the processes that its launcher started."""
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise RetrievalError(
            "The precision fp16 needs a GPU, and there is none; choose bf16 or float32."
        )
    accelerate = import_library("accelerate", "train")
    import_library("tensorboard", "train")
    for kind in ("FSDP", "DEEPSPEED"):
        if accelerate.utils.parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            raise RetrievalError(
                f"accelerate is configured for {kind}, which this trainer does not support; choose "
                "plain multi-GPU in 'accelerate config', with which the processes share the "
                "optimiser's state all the same (ZeRO, stage 1)."
            )
    accelerator = accelerate.Accelerator(
        cpu=not torch.cuda.is_available(),  # without it, processes on CPUs train apart
        mixed_precision="no" if config.precision == "float32" else config.precision,
        gradient_accumulation_steps=config.accumulate,
        log_with="tensorboard",
        project_dir=config.out,
        kwargs_handlers=[
            accelerate.InitProcessGroupKwargs(timeout=_TIMEOUT),
            # Older torch takes a weight cast without gradient, while tokens are merged, for the
            # pass that needs its gradient.
            accelerate.utils.AutocastKwargs(cache_enabled=False),
            # The buckets that processes exchange would be a second copy of all gradients.
            accelerate.DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    accelerator.init_trackers("tensorboard")
    return accelerator


def complete_cache(cache: LatentCache, base: Base, accelerator: Any, watcher: Watcher) -> None:
    """Fills the cache of the data set's latents and prompts, all processes together.

    Raises RetrievalError if it does not fit on the disk, or another process's shards are elsewhere;
    see also `fill_cache`.
    """
    if any(cache.find_missing()):
        base.vae.to(accelerator.device)
        base.prompts.to(accelerator.device)
        accelerator.print(check_disk(cache, base))
        rank, world = accelerator.process_index, accelerator.num_processes
        fill_cache(cache, base, rank, world, watcher.show_caching)
    accelerator.wait_for_everyone()
    base.vae.to("cpu")
    base.prompts.to("cpu")
    if any(cache.find_missing()):
        raise RetrievalError(
            f"The cache '{cache.folder}' lacks what other processes have computed; set cache to a "
            "folder that all machines share."
        )


def describe_run(
    folder: RunFolder, config: RunConfig, base: Base, cache: LatentCache, world: int, writes: bool
) -> None:
    """Records what the run is in its folder, or refuses to go on with another one."""
    recorded = folder.read_description()
    if recorded:
        refuse_changed_data(cache.data_set, recorded["data_set"])
    folder.describe_run(
        {
            **config.list_fixed(),
            "samples_per_step": config.batch_size * config.accumulate * world,
            "base": base.fingerprint,
            "data_set": fingerprint_index(cache.data_set),
        },
        writes,
    )


def make_objective(config: RunConfig, base: Base) -> PaperObjective:
    """A fresh network on the base, and the losses that train it."""
    unet = base.unet
    network = RetrievalControlNet.from_base(
        unet.state_dict(),
        base.name,
        config.seed,
        config=unet.config,
        query_pooling=config.query_pooling,
    )
    blank = None
    if unet.config.in_channels > unet.config.out_channels:  # an inpainting base
        blank = base.vae.encode(torch.zeros(1, 3, config.size, config.size)).float()
    return PaperObjective(network, unet, base.schedule, config, blank, base.channel_weights)


def order_parameters(objective: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name in the optimiser's order: by dimensions, then copied first."""
    trained = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]

    def rank(item: tuple[str, nn.Parameter]) -> tuple[bool, bool]:
        return item[1].ndim < 2, not item[0].startswith(COPIED)

    return dict(sorted(trained, key=rank))


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], config: RunConfig, world: int
) -> torch.optim.Optimizer:
    """AdamW; norms and biases do not decay, as 0 is not a neutral value for them.

    Of several processes each has a share of the state (ZeRO, stage 1).
    """
    groups = [
        {
            "params": [
                p
                for name, p in parameters.items()
                if (p.ndim >= 2, name.startswith(COPIED)) == (decays, copied)
            ],
            "weight_decay": config.weight_decay if decays else 0.0,
            "factor": config.copied_rate if copied else 1.0,
        }
        for decays in (True, False)
        for copied in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    kind, options = torch.optim.AdamW, {"lr": config.learning_rate}
    if config.optimizer == "adamw-8bit":
        kind = import_library("bitsandbytes", "train").optim.AdamW8bit
    elif config.optimizer == "adamw-fused":
        options["fused"] = True
    if world > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # it compiles much

        return ZeroRedundancyOptimizer(groups, kind, **options)
    return kind(groups, **options)


def resume(folder: RunFolder, state: RunState, world: int) -> int:
    """Goes on from the newest checkpoint, if there is one; returns the number of steps done.

    Raises:
        RetrievalError: the processes have found different checkpoints.
    """
    found = folder.load_newest()
    step = found[1]["step"] if found else 0
    steps = gather([step], world)
    if len(set(steps)) > 1:
        raise RetrievalError(
            f"In '{folder.folder}', the processes find checkpoints of the steps "
            f"{', '.join(map(str, steps))}; set out to a folder that all machines share."
        )
    if found:
        state.restore(*found)
    return step


def gather(values: list[Any], world: int) -> list[Any]:
    """The values of all processes, in their order."""
    if world == 1:
        return values
    return import_library("accelerate", "train").utils.gather_object(values)


def measure_step(
    accelerator: Any,
    passes: list[tuple[dict[str, Tensor], list[str]]],
    norm: float,
    interrupted: bool,
    step: int,
) -> tuple[dict[str, float], bool]:
    """The losses of a step, averaged over its passes and all processes, and whether to stop.

    Raises:
        RetrievalError: a loss or the gradient is not finite. It names the targets of the passes
            with such a loss, or of all passes. (With fp16, the scaler deals with the gradient.)
    """
    table = torch.stack(
        [torch.stack([v.detach() for v in losses.values()]) for losses, _ in passes]
    )
    flag = table.new_tensor([float(interrupted)])
    *values, stop = accelerator.reduce(torch.cat([table.mean(0), flag]), "mean").tolist()
    finite = all(map(math.isfinite, values))
    if not finite or (accelerator.scaler is None and not math.isfinite(norm)):
        named = [
            name
            for row, (_, names) in zip(table, passes)
            for name in names
            if finite or not bool(row.isfinite().all())
        ]
        named = list(dict.fromkeys(gather(named, accelerator.num_processes)))
        raise RetrievalError(
            f"Training stopped at step {step + 1}: its {'gradient' if finite else 'loss'} is not "
            f"finite, with the targets {', '.join(named)}; look at these pictures, or lower the "
            "learning rate and go on from the last checkpoint."
        )
    return dict(zip(passes[0][0], values)), stop > 0


def set_learning_rate(optimizer: Any, config: RunConfig, step: int) -> float:
    rate = config.learning_rate * scale_learning_rate(step, config.steps, config.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    return rate


def save(folder: RunFolder, state: RunState, step: int, writes: bool) -> None:
    """Saves a checkpoint; all processes call it, one `writes`."""
    state.gather_optimizer()
    if writes:
        tensors, values = state.collect()
        folder.save(step, tensors, {**values, "step": step})


def write_network(
    path: Path,
    objective: PaperObjective,
    trained: Mapping[str, Tensor],
    step: int,
    config: RunConfig,
    base: Base,
    cache: LatentCache,
) -> None:
    """Writes the network's file, in float16 and with its provenance.

    Args:
        trained: weights by their names in the objective, after `step` steps.
    """
    network = objective.finish(trained)
    network.card.training.update(
        config.list_fixed(),
        preset=list(config.preset),
        steps_done=step,
        base=base.fingerprint,
        data_set=fingerprint_index(cache.data_set),
        prediction=base.schedule.prediction,
    )
    network.save(path, torch.float16, config.decoder_rank or config.rank)
    print(f"The network is saved in '{path}'.", flush=True)
