"""Where a sampling run looked: the value of RETRIEVAL_MAP, and how it is filled.

A recorder lies in the transformer options of a clone of a patched MODEL. Every application of
references that finds it there adds its attention shares of one low-resolution site at each step.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...retrieval_core.sampling.attention_map import Shares, merge_shares

RECORDERS = "retrieval_recorders"
_KEY = "retrieval_map"


class Recorded(Protocol):
    """An application of references on a MODEL that a recorder may ask."""

    reference_count: int


class Recorder:
    """The shares of the last sampling run on the models that carry it.

    The host caches outputs: one recorder serves every run of an unchanged graph, and starts anew
    with each. It holds a few numbers for each position, on the device that sampled first; clones of
    a model that sample in threads on several devices add to it one after another.
    """

    def __init__(self) -> None:
        self.applications: list[Recorded] = []
        self.recorded: dict[int, Shares] = {}
        self.runs = 0
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> Recorder:
        return self

    def start(self, executor: Any, model: Any, *args: Any, **kw: Any) -> Any:
        """A PREPARE_SAMPLING wrapper: forgets the run before."""
        self.applications, self.recorded = list_applications(model), {}
        self.runs += 1
        return executor(model, *args, **kw)

    def add(
        self,
        application: Recorded,
        shares: Tensor,
        canvas: tuple[int, int] | None = None,
        corner: tuple[int, int] = (0, 0),
    ) -> None:
        """See `Shares.add`; `application` is one of `list_applications`."""
        with self._lock:
            recorded = self.recorded.setdefault(id(application), Shares())
            if recorded.total is not None:
                shares = shares.to(recorded.total.device)
            recorded.add(shares, canvas, corner)

    def shares(self) -> Tensor | None:
        """[B, 1 + references, h, w] on the CPU: mean shares, the null token's first, references in
        the order in which they were applied; None if nothing was retrieved.
        """
        if not self.recorded:
            return None
        like = next(iter(self.recorded.values())).mean().cpu()
        means = []
        for application in self.applications:
            recorded = self.recorded.get(id(application))
            if recorded is None:  # its part of sampling had no step in it
                shape = (len(like), 1 + application.reference_count, *like.shape[2:])
                means.append(like.new_zeros(shape))
            else:
                means.append(recorded.mean().cpu())
        return merge_shares(means)


def list_applications(model: Any) -> list[Recorded]:
    """What retrieves in a MODEL, in the order in which it was applied."""
    options = model.model_options.get("transformer_options", {})
    patches = options.get("patches", {}).get("output_block_patch", [])
    replaced = options.get("patches_replace", {}).get("attn1", {}).values()
    joint = [one for patch in replaced for one in getattr(patch, "applications", ())]
    found = [patch for patch in patches if hasattr(patch, "reference_count")]
    return [*found, *dict.fromkeys(joint)]


def record_map(model: Any) -> tuple[Any, Recorder]:
    """A clone of a MODEL that records where it looks, and the recorder."""
    recorder = Recorder()
    recording = model.clone()
    options = recording.model_options["transformer_options"]
    options[RECORDERS] = (*options.get(RECORDERS, ()), recorder)
    recording.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, _KEY, recorder.start)
    return recording, recorder
