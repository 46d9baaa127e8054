"""Where a sampling run looked: the value of RETRIEVAL_MAP, and how it is filled.

A recorder lies in the transformer options of a clone of a patched MODEL. Every application of
references that finds it there adds its attention shares of one low-resolution site at each step.
"""

from __future__ import annotations

from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...retrieval_core.sampling.attention_map import Shares, side_by_side

RECORDERS = "retrieval_recorders"
_KEY = "retrieval_map"


class Recorder:
    """The shares of the last sampling run on the models that carry it.

    The host caches outputs: one recorder serves every run of an unchanged graph, and starts anew
    with each. What it holds is a few numbers a place, on the device that sampled.
    """

    def __init__(self) -> None:
        self.sources: list[Any] = []
        self.parts: dict[int, Shares] = {}
        self.runs = 0

    def __deepcopy__(self, memo: dict) -> Recorder:
        return self

    def start(self, executor: Any, model: Any, *args: Any, **kw: Any) -> Any:
        """A PREPARE_SAMPLING wrapper: forgets the run before."""
        self.sources, self.parts = applications(model), {}
        self.runs += 1
        return executor(model, *args, **kw)

    def add(
        self,
        source: Any,
        shares: Tensor,
        canvas: tuple[int, int] | None = None,
        corner: tuple[int, int] = (0, 0),
    ) -> None:
        """See `Shares.add`; `source` is one of `applications`."""
        self.parts.setdefault(id(source), Shares()).add(shares, canvas, corner)

    def shares(self) -> Tensor | None:
        """[B, 1 + references, h, w] on the CPU: mean shares, the null token's first, references in
        the order in which they were applied; None if nothing was retrieved.
        """
        found = next(iter(self.parts.values()), None)
        if found is None:
            return None
        like = found.mean()
        means = []
        for source in self.sources:
            recorded = self.parts.get(id(source))
            if recorded is None:  # its part of sampling had no step in it
                shape = (len(like), 1 + source.reference_count, *like.shape[-2:])
                means.append(like.new_zeros(shape))
            else:
                means.append(recorded.mean())
        return side_by_side(means).cpu()


def applications(model: Any) -> list[Any]:
    """What retrieves in a MODEL, in the order in which it was applied."""
    options = model.model_options.get("transformer_options", {})
    patches = options.get("patches", {}).get("output_block_patch", [])
    replaced = options.get("patches_replace", {}).get("attn1", {}).values()
    joint = [one for held in replaced for one in getattr(held, "applications", ())]
    found = [patch for patch in patches if hasattr(patch, "reference_count")]
    return [*found, *dict.fromkeys(joint)]


def record(model: Any) -> tuple[Any, Recorder]:
    """A clone of a MODEL that records where it looks, and the recorder."""
    recorder = Recorder()
    recording = model.clone()
    options = recording.model_options["transformer_options"]
    options[RECORDERS] = (*options.get(RECORDERS, ()), recorder)
    recording.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, _KEY, recorder.start)
    return recording, recorder
