"""Per-step context that ComfyUI does not pass to U-Net patches.

Two wrappers put it into transformer_options: which rows are negative prompts, the crops of area
conditionings, the size of the whole latent, and the sigmas of percentages of sampling; and where
layers leave what a step's post-CFG function needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import comfy.utils
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ...retrieval_core.sampling.applications import COND, Application
from ...retrieval_core.sampling.controls import CONSTANT
from .loading import reserve_memory

KEY = "retrieval"
STEP = "retrieval_step"
TAKEN = "retrieval_taken"
UNCOND = 1
_CONDS = "retrieval_conds"
_HALVINGS = 24

Area = tuple[int, ...]  # height, width, y, x in latent pixels


@dataclass(eq=False)
class StepContext:
    """One call of the host's batching of conditionings.

    Caches what it computes; it lives for one step.

    Attributes:
        sampling: the model's sigma schedule, patched or not.
        sigma: the noise level, a tensor.
        shape: height and width of the whole latent.
        areas: conditioning's uuid -> (height, width, y, x) of its crop in latent pixels.
        unconditional: the indices of cond_or_uncond that are negative prompts.
    """

    sampling: Any
    sigma: Any
    shape: tuple[int, int]
    areas: Mapping[Any, Area]
    unconditional: frozenset[int]
    _cache: dict[Any, Any] = field(default_factory=dict)

    def within(self, start: float, end: float) -> bool:
        """Whether sigma lies between two percentages of sampling, by ControlNet's convention."""
        if (start, end) == (0.0, 1.0):
            return True
        if (start, end) not in self._cache:
            sigma = float(self.sigma.flatten()[0])
            first = float(self.sampling.percent_to_sigma(start))
            last = float(self.sampling.percent_to_sigma(end))
            self._cache[start, end] = last <= sigma <= first
        return self._cache[start, end]

    @cached_property
    def progress(self) -> float:
        """The percentage of sampling, 0..1, whose sigma this is: `percent_to_sigma` inverted."""
        sigma = float(self.sigma.flatten()[0])
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):  # bisection: in every schedule sigmas fall with it
            middle = (low + high) / 2
            if float(self.sampling.percent_to_sigma(middle)) > sigma:
                low = middle
            else:
                high = middle
        return (low + high) / 2


@dataclass(eq=False)
class Taken:
    """What layers take of references in one step; an object, since the host copies options' dicts.

    Attributes:
        found: application -> the `StepContext` of the first batch, and the entries of its chunks.
    """

    found: dict[Any, tuple[StepContext, list[Any]]] = field(default_factory=dict)


def strength_at(application: Application, context: StepContext | None) -> float:
    """The strength at a step by the host's percentages; the full one without a context."""
    if context is None:
        return application.strength
    if not context.within(application.start, application.end):
        return 0.0
    if application.curve == CONSTANT:
        return application.strength
    progress = min(max(context.progress, application.start), application.end)
    return application.strength_at(progress)


def chunk_kinds(options: Mapping[str, Any], context: StepContext | None) -> list[int]:
    """COND or UNCOND of each chunk of the batch, whichever index the guider gave it."""
    order = options.get("cond_or_uncond") or [COND]
    negative = {UNCOND} if context is None else context.unconditional
    return [UNCOND if index in negative else COND for index in order]


def chunk_areas(options: Mapping[str, Any], context: StepContext | None) -> list[Area | None]:
    """The crop of the latent that each chunk of the batch is; None for all of it."""
    order = options.get("cond_or_uncond") or [COND]
    if context is None:
        return [None] * len(order)
    return [context.areas.get(uuid) for uuid in options.get("uuids") or [None] * len(order)]


def crop_region(region: Tensor, context: StepContext, area: Area | None) -> Tensor:
    """Resizes a region [H, W] to the latent's resolution and crops it to an area, if any."""
    resized = comfy.utils.reshape_mask(region, (1, 1, *context.shape))[0, 0]
    if area is None:
        return resized
    height, width, y, x = area
    return resized[y : y + height, x : x + width]


def locate_crop(factor: int, context: StepContext | None, area: Area | None) -> tuple:
    """The last arguments of `Shares.add` for a crop, with `factor` latent pixels a position."""
    if context is None or area is None:
        return ()
    canvas = (-(-context.shape[0] // factor), -(-context.shape[1] // factor))
    return canvas, (area[2] // factor, area[3] // factor)


def attach(model: Any, application: Any) -> None:
    """Adds an application's `cleanup` and `nbytes` (a `RetrievalPatch` or a `JointApplication`) to
    a MODEL, and the two wrappers unless it has them."""
    model.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, application.cleanup)
    reserve = reserve_memory(application.nbytes)
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, reserve)
    for kind, wrapper in (
        (WrappersMP.PREDICT_NOISE, add_conditionings),
        (WrappersMP.CALC_COND_BATCH, add_context),
    ):
        if wrapper not in model.get_wrappers(kind, KEY):
            model.add_wrapper_with_key(kind, KEY, wrapper)


def add_conditionings(
    executor: Any, x: Any, timestep: Any, model_options: dict | None = None, seed: Any = None
) -> Any:
    """A PREDICT_NOISE wrapper that adds the guider's names of its conditionings, and `TAKEN`."""
    conds = getattr(executor.class_obj, "conds", None) or {}
    named = _with_option(model_options or {}, _CONDS, tuple(conds.items()))
    return executor(x, timestep, _with_option(named, TAKEN, Taken()), seed)


def add_context(
    executor: Any, model: Any, conds: Sequence, x_in: Any, timestep: Any, model_options: dict
) -> Any:
    """A CALC_COND_BATCH wrapper that adds the `StepContext`."""
    named = model_options.get("transformer_options", {}).get(_CONDS, ())
    areas = {
        cond.get("uuid"): tuple(cond["area"])
        for chunk in conds
        for cond in chunk or ()
        if len(cond.get("area") or ()) == 4
    }
    size, negative = tuple(x_in.shape[-2:]), _unconditional(conds, named)
    context = StepContext(model.model_sampling, timestep, size, areas, negative)
    return executor(model, conds, x_in, timestep, _with_option(model_options, STEP, context))


def _unconditional(conds: Sequence, named: Sequence[tuple[str, Any]]) -> frozenset[int]:
    """Indices that the guider names negative; if it names none, all but 0."""
    names = [next((n for n, value in named if value is c), None) for c in conds]
    if not any(names):
        return frozenset(range(1, len(conds)))
    return frozenset(i for i, name in enumerate(names) if name is not None and "negative" in name)


def _with_option(model_options: dict, key: str, value: Any) -> dict:
    options = {**model_options.get("transformer_options", {}), key: value}
    return {**model_options, "transformer_options": options}
