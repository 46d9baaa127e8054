"""The value of RETRIEVAL_MAP: attention shares of the references over one sampling run.

A recorder is stored in the transformer options of a clone of a patched MODEL. Every application of
references adds its attention shares at one low-resolution site or layer to it at each step.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...retrieval_core.bank.tokens import EncodedReference
from ...retrieval_core.sampling.attention_map import Shares, merge_shares
from .step_context import Area, StepContext, locate_crop

RECORDERS = "retrieval_recorders"
_KEY = "retrieval_map"


class Recorded(Protocol):
    """An application of references whose attention shares a recorder can hold."""

    references: Sequence[EncodedReference]


class Recorder:
    """Attention shares of the last sampling run, by application.

    The host caches node outputs, so that one recorder serves every run of an unchanged graph; each
    run clears it. The shares lie on the device that sampled first. A lock protects them: clones of
    a model may sample in threads on several devices.
    """

    def __init__(self) -> None:
        self.applications: list[Recorded] = []
        self.recorded: dict[int, Shares] = {}
        self.runs = 0
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> Recorder:
        return self

    def start(self, executor: Any, model: Any, *args: Any, **kw: Any) -> Any:
        """A PREPARE_SAMPLING wrapper: clears the previous run."""
        self.applications, self.recorded = list_applications(model), {}
        self.runs += 1
        return executor(model, *args, **kw)

    def add(
        self,
        application: Recorded,
        shares: Tensor,
        factor: int,
        context: StepContext | None,
        area: Area | None,
    ) -> None:
        """Adds an application's shares of one step [B, 1 + references, h, w].

        Args:
            application: one of `list_applications`.
            factor: latent pixels per position along an edge.
            area: the crop of the latent that the shares are of; None for all of it.
        """
        crop = locate_crop(factor, context, area)
        with self._lock:
            recorded = self.recorded.setdefault(id(application), Shares())
            if recorded.total is not None:
                shares = shares.to(recorded.total.device)
            recorded.add(shares, *crop)

    def references(self) -> list[EncodedReference]:
        """The references of `shares`, in its order, without tokens."""
        return [one for application in self.applications for one in application.references]

    def shares(self) -> Tensor | None:
        """[B, 1 + references, h, w] on the CPU: mean shares, the null token's first, references in
        the order in which they were applied; None if no reference acted where the map is measured:
        strength or the factor of its site 0, or no step between start and end.
        """
        if not self.recorded:
            return None
        found = {key: recorded.mean().cpu() for key, recorded in self.recorded.items()}
        like = next(iter(found.values()))
        means = []
        for application in self.applications:
            shape = (len(like), 1 + len(application.references), *like.shape[2:])
            # Nothing is recorded where no step lies between start and end.
            means.append(found.get(id(application), like.new_zeros(shape)))
        return merge_shares(means)


def list_applications(model: Any) -> list[Recorded]:
    """Lists the applications of references to a MODEL: trained ones, then training-free ones."""
    options = model.model_options.get("transformer_options", {})
    patches = options.get("patches", {}).get("output_block_patch", [])
    replaced = options.get("patches_replace", {}).get("attn1", {}).values()
    joint = [one for patch in replaced for one in getattr(patch, "applications", ())]
    found = [patch for patch in patches if hasattr(patch, "references")]
    return [*found, *dict.fromkeys(joint)]


def record_map(model: Any) -> tuple[Any, Recorder]:
    """Clones a MODEL with a recorder of its attention shares."""
    recorder = Recorder()
    recording = model.clone()
    options = recording.model_options["transformer_options"]
    options[RECORDERS] = (*options.get(RECORDERS, ()), recorder)
    recording.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, _KEY, recorder.start)
    return recording, recorder
