"""The benchmark's results as rows and as text."""

from __future__ import annotations

from typing import Any

from .timing import Series

_MIB = 1 << 20


def entry(
    key: str, title: str, series: Series, added: int | None, bank_bytes: int, base: int
) -> dict[str, Any]:
    """One row. floor: 1 + operations added over operations of the base. factor: how many times the
    operations' share of the base's time they take; None where nothing was counted."""
    floor = None if added is None else 1 + added / base
    factor = None if not added else (series.ratio - 1) / (added / base)
    low, high = series.spread
    return {
        "key": key,
        "title": title,
        "seconds a step": series.seconds,
        "ratio": round(series.ratio, 4),
        "spread": [round(low, 4), round(high, 4)],
        "floor": None if floor is None else round(floor, 4),
        "factor": None if factor is None else round(factor, 2),
        "peak MiB": round(series.peak_bytes / _MIB),
        "bank MiB": round(bank_bytes / _MIB, 1),
    }


def once(title: str, series: Series, floor: float) -> dict[str, Any]:
    """One cost before sampling. floor: its operations over those of what it is compared with."""
    return {
        "title": title,
        "seconds": series.seconds,
        "ratio": round(series.ratio, 4),
        "spread": [round(ratio, 4) for ratio in series.spread],
        "floor": round(floor, 4),
    }


def text(result: dict[str, Any]) -> str:
    """The table, under a line about the machine and the model."""
    about = ("host", "torch", "device", "threads", "dtype", "dynamic VRAM", "base", "pixels")
    lines = [", ".join(f"{name} {result[name]}" for name in about)]
    lines.append(
        f"Rows in one call of the U-Net: {result['rows a call']}; "
        f"{result['base operations a step'] / 1e12:.3f}e12 operations a step of the base. "
        f"Memory: {result['memory']}, all variants' banks included."
    )
    width = max(len(row["title"]) for row in result["steps"])
    head = ("s/step", "ratio", "spread", "floor", "factor", "peak MiB", "bank MiB")
    lines += ["", f"{'':{width}}" + "".join(f"{name:>{w}}" for name, w in zip(head, _WIDTHS))]
    for row in result["steps"]:
        spread = "{:.3f}-{:.3f}".format(*row["spread"])
        cells = (
            f"{row['seconds a step']:.3f}",
            f"{row['ratio']:.3f}",
            spread,
            _number(row["floor"], 3),
            _number(row["factor"], 2),
            str(row["peak MiB"]),
            str(row["bank MiB"]),
        )
        lines.append(
            f"{row['title']:{width}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, _WIDTHS))
        )
    lines += ["", "Done once, over one row through the U-Net's encoder:"]
    for one in result["once"]:
        low, high = one["spread"]
        lines.append(
            f"{one['title']}: {one['ratio']:.3f} ({low:.3f}-{high:.3f}), floor {one['floor']:.3f}"
        )
    lines += [
        "",
        "ratio: to the base steps before and after it in the same run, median and spread over the "
        "rounds;",
        "floor: 1 + operations added / operations of the base; factor: (ratio - 1) / (floor - 1).",
    ]
    return "\n".join(lines)


_WIDTHS = (9, 8, 14, 8, 8, 10, 10)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
