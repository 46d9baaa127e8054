"""Applies references to a MODEL, whichever network encoded them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...retrieval_core.bank.site_bank import Bank
from ...retrieval_core.errors import RetrievalError
from ...retrieval_core.network.controlnet import Guidance
from ...retrieval_core.sampling.applications import Application
from ...retrieval_core.sampling.controls import Controls
from ...retrieval_core.sampling.presets import BALANCED, PRESETS
from ...retrieval_core.sampling.regions import soften
from .base_model import check_fit, detect_base
from .encoded_references import References


def apply_references(
    model: Any,
    references: References,
    strength: float,
    start: float = 0.0,
    end: float = 1.0,
    guidance: Guidance | None = None,
    region: Tensor | None = None,
    controls: Controls | None = None,
    preset: str = BALANCED,
) -> Any:
    """A clone of a MODEL that retrieves from the references; the input model is left as it was.

    Args:
        strength: 1 is what the network's file recommends, 0 the model unchanged.
        guidance: rows that retrieve; None for what the network's file recommends.
        region: [H, W] or [1, H, W] in 0..1 of any size, or None for everywhere.
        controls: None for the defaults. preset: one of `PRESETS`.

    Raises:
        RetrievalError: another base, no reference of a weight above 0, a bad region, or see
            `Application` and `Controls.site_strengths`.
    """
    network, controls = references.network, controls or Controls()
    check_fit(detect_base(model), network.config, network.base, network.name)
    acting: dict[str, Any] = {
        "strength": strength * network.recommended["strength"],
        "start": start,
        "end": end,
        "guidance": guidance or network.recommended["guidance"],
        "region": None if region is None else soften(_check_region(region), controls.region_blur),
        "curve": controls.curve,
        "apart": controls.apart,
    }
    Application(Bank(), **acting)  # its checks hold also where nothing will act
    if strength == 0 or not any(controls.groups) or not references.encoded:
        return model.clone()
    return network.apply(model, references, controls, strength, PRESETS[preset], **acting)


def _check_region(region: Tensor) -> Tensor:
    """One mask as [H, W] float32 in 0..1; RetrievalError for several, an empty one, or NaN."""
    region = region.detach().cpu().float()
    planes = region.reshape(-1, *region.shape[-2:]) if region.ndim > 1 else region[None, None]
    if len(planes) != 1 or not planes.numel():
        raise RetrievalError(
            f"The region has {len(planes)} masks of shape {list(region.shape)}; connect one mask."
        )
    if not planes.isfinite().all() or planes.max() <= 0:
        raise RetrievalError(
            f"The region selects none of its {planes.shape[2]} x {planes.shape[1]} pixels; paint "
            "where the references are to appear, or disconnect it."
        )
    return planes[0].clamp(0, 1)
