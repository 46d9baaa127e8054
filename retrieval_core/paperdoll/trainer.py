"""The training loop: AdamW, clipping, EMA, exact resume and interruption, in one process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import RetrievalError
from ..training.interruption import Interruption
from ..training.paper_objective import seed_generator
from ..training.progress import Progress
from .checkpoint import LAST, load_checkpoint, remove_leftovers, save_checkpoint
from .ema import ExponentialMovingAverage
from .loss_plot import write_losses
from .prefetch import prefetch_batches
from .training_settings import TrainingSettings

MOST_SKIPPED_IN_A_ROW = 20

LossFunction = Callable[[Any, torch.Generator], Mapping[str, torch.Tensor]]


class Batches(Protocol):
    """Training data; `batch` depends on the step only (and on seeds given to the constructor)."""

    def batch(self, step: int) -> Any: ...


class Trainer:
    """Trains the parameters of a module that require a gradient.

    parameters_owner: the module, whose buffers no step changes; checkpoints store parameters by
        their names in it.
    loss_fn: (batch, generator) -> scalar tensors by name; "loss" is minimised. All randomness must
        come from the generator, which is on `device`, so that a resumed run repeats it.
    batches: see `Batches`. settings: see `TrainingSettings`.
    folder: for checkpoints, `losses.csv` and `losses.png`; it names the progress bar. A checkpoint
        found there is resumed.
    device: of owner and optimiser.
    description: JSON values that identify the run (lock, text drop, ...); it is resumed only with
        the same ones.
    rate_factors: prefix of parameter names -> factor on their learning rate, so that copies of
        trained layers can learn slower than fresh ones.

    `step`: steps done. `skipped`: those of them whose loss or gradient was not finite.
    `history`: name -> one value per step done, of every loss and of "learning_rate" and
    "grad_norm" (before clipping); NaN where a step has none.
    `ema`: averages of the trained parameters, by name.
    Raises RetrievalError if the folder cannot be used or holds another run.
    """

    def __init__(
        self,
        parameters_owner: nn.Module,
        loss_fn: LossFunction,
        batches: Batches,
        settings: TrainingSettings,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        description: Mapping[str, Any] | None = None,
        rate_factors: Mapping[str, float] | None = None,
    ) -> None:
        self.owner = parameters_owner.to(device)
        self.loss_fn, self.batches, self.settings = loss_fn, batches, settings
        self.device = torch.device(device)
        self.rate_factors = dict(rate_factors or {})
        # Through JSON, as in a checkpoint: a tuple becomes a list.
        about = {**(description or {}), "rate_factors": self.rate_factors}
        self.description = json.loads(json.dumps(about))
        self.folder = _prepare_folder(Path(folder))
        self.parameters = {n: p for n, p in self.owner.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise RetrievalError("Nothing to train: no parameter requires a gradient.")
        self.optimizer = self._make_optimizer()
        self.ema = ExponentialMovingAverage(self.parameters, settings.ema_decay)
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.history: dict[str, list[float]] = {}
        self._consistent = True  # False while a step is half applied
        checkpoint = load_checkpoint(self.folder)
        if checkpoint is not None:
            self._restore(*checkpoint)

    def run(self, until: int | None = None) -> bool:
        """Trains to step `until` (the settings' `steps` if None), saves, and says so in one line.

        Ctrl-C and SIGTERM finish the current step, save, and return True for interrupted; a second
        Ctrl-C raises KeyboardInterrupt at once. An exception of the loss or the data is raised
        after the last whole step has been saved. RetrievalError after 20 steps in a row without a
        finite loss and gradient.
        """
        end = self.settings.steps if until is None else min(until, self.settings.steps)
        first = saved_at = self.step
        # The last save is inside the interruption, so that Ctrl-C cannot prevent it.
        with Interruption() as interruption:
            try:
                with (
                    closing(prefetch_batches(self.batches.batch, first, end)) as batches,
                    Progress(self.folder.name, first, end) as progress,
                ):
                    while self.step < end and not interruption.requested:
                        losses = self._train_step(next(batches))
                        progress.update(self.step, losses, self.skipped)
                        if self.step % self.settings.checkpoint_every == 0 and self.step < end:
                            self.save()
                            saved_at = self.step
                        self._stop_if_hopeless()
            finally:
                if self._consistent and self.step > saved_at:
                    self.save()
        stopped = interruption.requested and self.step < end
        at, file = f"step {self.step} of {self.settings.steps}", self.folder / LAST
        if stopped:
            again = f"run the same command again to go on from {file}"
            print(f"Training was interrupted after {at}; {again}.", flush=True)
        else:
            print(f"Training is at {at}, saved in {file}.", flush=True)
        return stopped

    def save(self) -> None:
        """Writes the checkpoint, `losses.csv` and `losses.png`."""
        save_checkpoint(self.folder, *self._snapshot())
        write_losses(self.folder, self.history)

    def _make_optimizer(self) -> torch.optim.AdamW:
        settings = self.settings
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            fits = [f for prefix, f in self.rate_factors.items() if name.startswith(prefix)]
            # Norms and biases do not decay, as is customary: 0 is not a neutral value for them.
            decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((fits[0] if fits else 1.0, decay), []).append(parameter)
        return torch.optim.AdamW(
            [{"params": g, "factor": f, "weight_decay": d} for (f, d), g in groups.items()],
            lr=settings.learning_rate,
            betas=settings.betas,
            fused=True,
        )

    def _train_step(self, batch: Any) -> dict[str, float]:
        settings = self.settings
        rate = settings.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)  # an aborted step may have left gradients
        generator = seed_generator(settings.seed, self.step, self.device)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"
        ):
            losses = self.loss_fn(batch, generator)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip_norm)
        # One transfer for all values: on an accelerator each one waits for the device.
        scalars = [*losses.values(), norm]
        values = torch.stack([value.detach().reshape(()).float() for value in scalars]).tolist()
        named = dict(zip([*losses, "grad_norm"], values))
        self._consistent = False
        if math.isfinite(named["loss"]) and math.isfinite(named["grad_norm"]):
            self.optimizer.step()
            self.ema.update()
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self._record({**named, "learning_rate": rate})
        self.step += 1
        self._consistent = True
        self.optimizer.zero_grad(set_to_none=True)
        return named

    def _stop_if_hopeless(self) -> None:
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise RetrievalError(
                f"Training stopped at step {self.step}: the loss or its gradient was not finite "
                f"{self.skipped_in_a_row} steps in a row; lower the learning rate "
                f"({self.settings.learning_rate:g}) or check the data."
            )

    def _record(self, values: dict[str, float]) -> None:
        for name in values:
            self.history.setdefault(name, [math.nan] * self.step)
        for name, series in self.history.items():
            series.append(values.get(name, math.nan))

    def _snapshot(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All tensors and JSON values that a run needs to resume exactly."""
        tensors = {f"weights.{name}": p for name, p in self.parameters.items()}
        tensors |= {f"ema.{name}": average for name, average in self.ema.averages.items()}
        for name, values in self.history.items():
            tensors[f"history.{name}"] = torch.tensor(values, dtype=torch.float64)
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter)
            if state:  # none before the parameter's first gradient
                for key in ("exp_avg", "exp_avg_sq", "step"):
                    tensors[f"{key}.{name}"] = state[key]
        state = {
            "settings": self.settings.as_json(),
            "description": self.description,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "ema_updates": self.ema.updates,
            "step": self.step,
        }
        return tensors, state

    @torch.no_grad()
    def _restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        self._refuse_other_run(state, tensors)
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"weights.{name}"])
            self.ema.averages[name].copy_(tensors[f"ema.{name}"])
            if f"step.{name}" in tensors:
                # Copied into new memory with the parameter's layout: a view into the file could be
                # aligned differently, and vector code may then round differently.
                self.optimizer.state[parameter] = {
                    "step": tensors[f"step.{name}"].clone().to(parameter.device),
                    "exp_avg": torch.zeros_like(parameter).copy_(tensors[f"exp_avg.{name}"]),
                    "exp_avg_sq": torch.zeros_like(parameter).copy_(tensors[f"exp_avg_sq.{name}"]),
                }
        series = {n: t.tolist() for n, t in tensors.items() if n.startswith("history.")}
        self.history = {name.removeprefix("history."): values for name, values in series.items()}
        self.step = state["step"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.ema.updates = state["ema_updates"]

    def _refuse_other_run(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        now = self.settings.as_json()
        then = {"precision": "float32", **state["settings"]}  # older checkpoints lack it
        pairs = [(n, then.get(n), now[n]) for n in now if n != "checkpoint_every"]
        described = sorted({*state["description"], *self.description})
        pairs += [(n, state["description"].get(n), self.description.get(n)) for n in described]
        pairs += [
            (f"the shape of {name}", list(tensors[f"weights.{name}"].shape), list(p.shape))
            for name, p in self.parameters.items()
            if f"weights.{name}" in tensors
        ]
        there = {n.removeprefix("weights.") for n in tensors if n.startswith("weights.")}
        for name in sorted(there ^ set(self.parameters)):
            words = ("trained", "frozen")
            pairs.append((name, words[name not in there], words[name not in self.parameters]))
        for name, before, after in pairs:
            if before != after:
                raise RetrievalError(
                    f"The run in {self.folder} was started with {name} = {before}, not {after}: "
                    f"use {before} to go on with it, or another folder to start anew."
                )


def _prepare_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RetrievalError(
            f"The training folder {folder} cannot be written ({error}); choose another."
        ) from error
    return folder
