"""Presets of an application: points between following the text and keeping the character."""

from __future__ import annotations

from dataclasses import dataclass

MEANS_END = 0.85


@dataclass(frozen=True)
class Preset:
    """Settings of both modes; ends are fractions of sampling, 0 (all noise) to 1.

    Attributes:
        strength: factor of the strength of a trained network.
        end: until when a trained network acts.
        detail_end: training-free: until when a step's prediction takes the references' detail, and
            not only, until `MEANS_END`, the means of tokens (`training_free.latent_pull`).
    """

    strength: float
    end: float
    detail_end: float

    def pull_at(self, progress: float) -> tuple[float, float]:
        """The parts that means and detail move at a progress of sampling."""
        return float(progress < MEANS_END), float(progress < self.detail_end)

    def limit(self, strength: float, start: float, end: float) -> tuple[float, float]:
        """Strength and end of a trained network that is to act from start to end."""
        return self.strength * strength, max(start, min(end, self.end))


BALANCED = "balanced"
PRESETS = {
    "prompt first": Preset(strength=1.0, end=0.7, detail_end=0.0),
    BALANCED: Preset(strength=1.0, end=1.0, detail_end=0.6),
    "character first": Preset(strength=1.5, end=1.0, detail_end=0.85),
}
