"""Presets of an application: points between following the text and keeping the character."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Settings of both modes; all ends are fractions of sampling, 0 (all noise) to 1.

    Attributes:
        strength: factor of the strength of a trained network.
        end: until when a trained network acts.
        means, means_end: training-free: part of the distance to the references' latents that the
            mean of a token moves, and until when.
        detail, detail_end: the same of what differs from that mean within the token.
        yields: training-free: part of a shift against the text's direction that is dropped.
    """

    strength: float = 1.0
    end: float = 1.0
    means: float = 1.0
    means_end: float = 0.85
    detail: float = 1.0
    detail_end: float = 0.4
    yields: float = 1.0

    def pull_at(self, progress: float) -> tuple[float, float]:
        """The parts that means and detail move at a progress of sampling."""
        means = self.means if progress <= self.means_end else 0.0
        return means, self.detail if progress <= self.detail_end else 0.0


BALANCED = "balanced"
PRESETS = {
    "prompt first": Preset(detail=0.0),
    BALANCED: Preset(),
    "character first": Preset(strength=1.5, means_end=1.0, detail_end=0.6, yields=0.0),
}
