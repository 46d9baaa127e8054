"""What the host knows of one evaluation of the model and a U-Net patch is not told.

Two wrappers note it in transformer_options: which of the conditionings are negative, where an area
conditioning's crop lies, how large the whole latent is, and the sigmas of percentages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from comfy.patcher_extension import WrappersMP

from ...retrieval_core.sampling.applications import Retrieval
from ...retrieval_core.sampling.controls import CONSTANT

KEY = "retrieval"
STEP = "retrieval_step"
_CONDS = "retrieval_conds"
_HALVINGS = 24


@dataclass(frozen=True, eq=False)
class Step:
    """One call of the host's batching of conditionings.

    Attributes:
        sampling: the model's sigma schedule, with whatever was patched onto the model.
        sigma: the noise level, a tensor.
        shape: height and width of the whole latent.
        areas: conditioning's uuid -> (height, width, y, x) of its crop in latent pixels.
        unconditional: the indices of cond_or_uncond that are negative prompts.
    """

    sampling: Any
    sigma: Any
    shape: tuple[int, int]
    areas: Mapping[Any, tuple[int, int, int, int]]
    unconditional: frozenset[int]
    _memo: dict[Any, Any] = field(default_factory=dict)

    def within(self, start: float, end: float) -> bool:
        """Whether sigma lies between two percentages of sampling, by ControlNet's convention."""
        if (start, end) == (0.0, 1.0):
            return True
        if (start, end) not in self._memo:
            sigma = float(self.sigma.flatten()[0])
            first = float(self.sampling.percent_to_sigma(start))
            last = float(self.sampling.percent_to_sigma(end))
            self._memo[start, end] = last <= sigma <= first
        return self._memo[start, end]

    def progress(self) -> float:
        """The percentage of sampling, 0..1, whose sigma this is: `percent_to_sigma` inverted."""
        if "progress" not in self._memo:
            sigma = float(self.sigma.flatten()[0])
            low, high = 0.0, 1.0
            for _ in range(_HALVINGS):  # sigmas fall as the percentage grows, in every schedule
                middle = (low + high) / 2
                if float(self.sampling.percent_to_sigma(middle)) > sigma:
                    low = middle
                else:
                    high = middle
            self._memo["progress"] = (low + high) / 2
        return self._memo["progress"]


def strength_at(retrieval: Retrieval, noted: Step | None) -> float:
    """The strength at a step by the host's percentages; whole where the host notes no steps."""
    if noted is None:
        return retrieval.strength
    if not noted.within(retrieval.start, retrieval.end):
        return 0.0
    if retrieval.curve == CONSTANT:
        return retrieval.strength
    progress = min(max(noted.progress(), retrieval.start), retrieval.end)
    return retrieval.strength_at(progress)


def add_wrappers(model: Any) -> None:
    """Notes each step of a model from now on; once, however many patches read it."""
    for kind, wrapper in (
        (WrappersMP.PREDICT_NOISE, note_conditionings),
        (WrappersMP.CALC_COND_BATCH, note_step),
    ):
        if wrapper not in model.get_wrappers(kind, KEY):
            model.add_wrapper_with_key(kind, KEY, wrapper)


def note_conditionings(
    executor: Any, x: Any, timestep: Any, model_options: dict | None = None, seed: Any = None
) -> Any:
    """A PREDICT_NOISE wrapper: the guider alone knows which conditionings are negative."""
    conds = getattr(executor.class_obj, "conds", None) or {}
    named = tuple((name, value) for name, value in conds.items())
    return executor(x, timestep, _noted(model_options or {}, _CONDS, named), seed)


def note_step(
    executor: Any, model: Any, conds: Sequence, x_in: Any, timestep: Any, model_options: dict
) -> Any:
    """A CALC_COND_BATCH wrapper: notes the `Step`."""
    named = model_options.get("transformer_options", {}).get(_CONDS, ())
    areas = {}
    for cond in (c for chunk in conds for c in chunk or ()):
        area = cond.get("area")
        if area is not None and len(area) == 4:
            areas[cond.get("uuid")] = tuple(area)
    step = Step(
        model.model_sampling,
        timestep,
        tuple(x_in.shape[-2:]),
        areas,
        _unconditional(conds, named),
    )
    return executor(model, conds, x_in, timestep, _noted(model_options, STEP, step))


def _unconditional(conds: Sequence, named: Sequence[tuple[str, Any]]) -> frozenset[int]:
    """Guiders order conditionings as they like; without their word, all but 0 are negative."""
    names = [next((n for n, value in named if value is c), None) for c in conds]
    if not any(names):
        return frozenset(range(1, len(conds)))
    return frozenset(i for i, name in enumerate(names) if name is not None and "negative" in name)


def _noted(model_options: dict, key: str, value: Any) -> dict:
    noted = {**model_options.get("transformer_options", {}), key: value}
    return {**model_options, "transformer_options": noted}
