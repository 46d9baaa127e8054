"""Finer settings of an application: strength over the steps and by group of sites, region edges,
token budget, isolation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..bank.token_budget import AUTOMATIC, Budget, check_budget
from ..errors import RetrievalError
from ..network.unet import MIDDLE, UNetConfig

COMPOSITION, MEDIUM, DETAIL = "composition", "middle", "detail"
GROUPS = (COMPOSITION, MEDIUM, DETAIL)

# Strengths of composition, middle and detail.
GROUP_PRESETS: dict[str, tuple[float, float, float]] = {
    "all": (1.0, 1.0, 1.0),
    "composition only": (1.0, 0.0, 0.0),
    "composition and middle": (1.0, 1.0, 0.0),
    "middle only": (0.0, 1.0, 0.0),
    "middle and detail": (0.0, 1.0, 1.0),
    "detail only": (0.0, 0.0, 1.0),
}


@dataclass(frozen=True)
class StrengthCurve:
    """Factors of the strength, evenly spaced over the part of sampling in which retrieval acts.

    Interpolates linearly, or, if `smooth`, by smoothstep (3 t^2 - 2 t^3). The factors are finite.
    """

    factors: tuple[float, ...] = (1.0,)
    smooth: bool = False

    def at(self, position: float) -> float:
        """The factor at a position from 0 (retrieval starts) to 1 (it ends)."""
        last = len(self.factors) - 1
        index = min(max(position, 0.0), 1.0) * last
        left = min(int(index), max(last - 1, 0))
        right = min(left + 1, last)
        t = index - left
        if self.smooth:
            t = t * t * (3 - 2 * t)
        return self.factors[left] * (1 - t) + self.factors[right] * t


CONSTANT = StrengthCurve()
CURVES: dict[str, StrengthCurve] = {
    "constant": CONSTANT,
    "ease in": StrengthCurve((0.0, 1.0), True),
    "ease out": StrengthCurve((1.0, 0.0), True),
    "ease in and out": StrengthCurve((0.0, 1.0, 0.0), True),
}


def parse_curve(text: str) -> StrengthCurve:
    """Reads a curve's name in `CURVES`, or its factors with commas between ("1, 0.5, 0").

    Raises:
        RetrievalError: neither a name nor finite numbers.
    """
    named = CURVES.get(text.strip().lower())
    if named is not None:
        return named
    factors = []
    for part in text.split(","):
        try:
            factors.append(float(part))
        except ValueError:
            factors.append(math.nan)
        if not math.isfinite(factors[-1]):
            names = ", ".join(f"'{name}'" for name in CURVES)
            raise RetrievalError(
                f"The strength curve {text!r} has {part.strip()!r} where a number belongs; write "
                f"numbers with commas between them, as in '1, 0.5, 0', or one of {names}."
            )
    return StrengthCurve(tuple(factors))


def group_sites(config: UNetConfig) -> dict[str, str]:
    """site -> its group: composition (the middle block and the coarsest sites), detail (the finest)
    or middle (those between).
    """
    factors = config.site_downsampling()
    return {site: choose_group(factors[site], factors.values(), site == MIDDLE) for site in factors}


def choose_group(factor: int, factors: Collection[int], middle: bool) -> str:
    """The group of a site or layer that works at 1 / `factor` of the latent's resolution.

    Args:
        factors: of all sites. middle: whether it is in the middle block.
    """
    finest, coarsest = min(factors), max(factors)
    if middle or (factor == coarsest and coarsest > finest):
        return COMPOSITION
    return DETAIL if factor == finest else MEDIUM


@dataclass(frozen=True)
class Controls:
    """Settings of one application of references.

    Attributes:
        curve: of the strength over the active part of sampling.
        groups: factors of the strength at the sites of composition, middle and detail.
        region_blur: radius in pixels of the region's mask, see `regions.soften`.
        token_budget: the most tokens of the bank at a site, see `token_budget.choose_budgets`.
        apart: see `applications.Application`.

    Raises:
        RetrievalError: a factor that is not finite, a blur below 0, a budget below 1, or `apart`
            outside 0..1.
    """

    curve: StrengthCurve = CONSTANT
    groups: tuple[float, float, float] = (1.0, 1.0, 1.0)
    region_blur: float = 0.0
    token_budget: Budget = AUTOMATIC
    apart: float = 0.0

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.groups)):
            raise RetrievalError(
                f"The strengths of composition, middle and detail are {list(self.groups)}; give "
                "three finite numbers."
            )
        if not math.isfinite(self.region_blur) or self.region_blur < 0:
            raise RetrievalError(
                f"The region blur is {self.region_blur}; give 0 pixels (edges as painted) or more."
            )
        check_budget(self.token_budget)
        if not 0 <= self.apart <= 1:
            raise RetrievalError(
                f"Regions are to be kept apart until {self.apart:g} of sampling; give a number "
                "from 0 (never) to 1 (to the end)."
            )

    def site_strengths(self, groups: Mapping[str, str]) -> dict[str, float]:
        """site -> factor of the strength, from site -> group (`group_sites`).

        Raises:
            RetrievalError: factors above 0 were given only to groups that have no site.
        """
        chosen = dict(zip(GROUPS, self.groups, strict=True))
        strengths = {site: chosen[group] for site, group in groups.items()}
        if any(self.groups) and not any(strengths.values()):
            wanted = " and ".join(name for name, factor in chosen.items() if factor)
            present = ", ".join(name for name in GROUPS if name in groups.values())
            raise RetrievalError(
                f"Only the sites of '{wanted}' were given a strength and this model has none; "
                f"choose among {present}."
            )
        return strengths
