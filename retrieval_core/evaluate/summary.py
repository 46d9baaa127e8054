"""The rows of an evaluation as a table: means over characters with bootstrap standard errors."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..metrics import Estimate, bootstrap
from .protocol import HELD_OUT, IN_DOMAIN
from .scores import Scorer

Row = Mapping[str, Any]
DIVERSITY, WEIGHTED = "diversity", "weighted diversity"


@dataclass(frozen=True)
class Line:
    """One method at one weight on one kind of characters; all scores in percent.

    scores: name -> estimate over characters (the pictures of one are not independent).
    by_prompt: diversity by prompt name, as in Table 4.
    """

    method: str
    weight: float | None
    domain: str
    pictures: int
    scores: dict[str, Estimate]
    by_prompt: dict[str, float]

    @property
    def title(self) -> str:
        if self.weight is None:
            return self.method
        note = " (no retrieval)" if self.weight == 0 else ""
        return f"{self.method}, {self.weight:g}{note}"


def summarise(rows: Sequence[Row], scorer: Scorer) -> list[Line]:
    """A line for each method, weight and domain, in the order of their first rows."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["method"], row["weight"], row["domain"]].append(row)
    # In the order of weights, whatever order they were run in: a resumed run gives the same table.
    methods = list(dict.fromkeys(row["method"] for row in rows))
    domains = [IN_DOMAIN, HELD_OUT]

    def place(key: tuple) -> tuple:
        method, weight, domain = key
        return methods.index(method), -1.0 if weight is None else weight, domains.index(domain)

    return [_line(*key, groups[key], scorer) for key in sorted(groups, key=place)]


def _line(
    method: str, weight: float | None, domain: str, rows: Sequence[Row], scorer: Scorer
) -> Line:
    rows = sorted(rows, key=lambda r: (r["character"], r["prompt"], r["seed"]))
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    first = [name for name in (scorer.similarity, scorer.text) if name in names]
    scores = {}
    for name in [*first, *(n for n in names if n not in first)]:
        scores[name] = _over_characters(rows, lambda r, n=name: r["scores"].get(n, []))
    sets: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        sets[row["character"], row["prompt"]].append(row)
    plain, weighted = defaultdict(list), defaultdict(list)
    by_prompt = defaultdict(list)
    for (character, prompt), one in sets.items():
        answers = {
            question: [a for row in one for a in row["answers"][question]]
            for question in one[0]["answers"]
        }
        if sum(len(row["pictures"]) for row in one) < 2:
            continue
        similarity = [s for row in one for s in row["scores"][scorer.similarity]]
        found = scorer.diversity(answers, similarity)
        if found is None:
            continue
        plain[character].append(found.score.mean)
        by_prompt[prompt].append(found.score.mean)
        if found.weighted is not None:
            weighted[character].append(found.weighted.mean)
    for name, values in ((DIVERSITY, plain), (WEIGHTED, weighted)):
        if values:
            scores[name] = bootstrap([float(np.mean(v)) for v in values.values()])
    pictures = sum(len(row["pictures"]) for row in rows)
    means = {prompt: float(np.mean(values)) for prompt, values in sorted(by_prompt.items())}
    return Line(method, weight, domain, pictures, scores, means)


def _over_characters(rows: Sequence[Row], values: Callable[[Row], Sequence[float]]) -> Estimate:
    """Mean of the characters' means, and its bootstrap error over characters."""
    of: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        of[row["character"]] += values(row)
    return bootstrap([float(np.mean(v)) for v in of.values() if v])


def write_csv(lines: Sequence[Line]) -> str:
    """Every mean and standard error in columns of their own."""
    names = list(dict.fromkeys(name for line in lines for name in line.scores))
    prompts = sorted({prompt for line in lines for prompt in line.by_prompt})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = [column for name in names for column in (name, f"{name} standard error")]
    by_prompt = [f"diversity {prompt}" for prompt in prompts]
    writer.writerow(["method", "weight", "characters", "pictures", *columns, *by_prompt])
    for line in lines:
        cells: list[Any] = [line.method, "" if line.weight is None else f"{line.weight:g}"]
        cells += [line.domain, line.pictures]
        for name in names:
            one = line.scores.get(name)
            cells += ["", ""] if one is None else [f"{one.mean:.4f}", f"{one.standard_error:.4f}"]
        cells += [
            f"{line.by_prompt[prompt]:.4f}" if prompt in line.by_prompt else ""
            for prompt in prompts
        ]
        writer.writerow(cells)
    return file.getvalue()


def write_markdown(lines: Sequence[Line]) -> str:
    """The same to be read: mean ± standard error over characters, in percent."""
    names = list(dict.fromkeys(name for line in lines for name in line.scores))
    prompts = sorted({prompt for line in lines for prompt in line.by_prompt})
    parts = ["All numbers in percent: mean ± bootstrap standard error over characters."]
    for domain in (IN_DOMAIN, HELD_OUT):
        own = [line for line in lines if line.domain == domain]
        if not own:
            continue
        parts += ["", f"## {domain} characters", "", _row("method", "pictures", *names)]
        parts.append(_row(*["---"] * (2 + len(names))))
        for line in own:
            cells = [str(line.scores[n]) if n in line.scores else "" for n in names]
            parts.append(_row(line.title, str(line.pictures), *cells))
        if prompts:
            parts += ["", "Diversity by prompt (as Table 4):", "", _row("method", *prompts)]
            parts.append(_row(*["---"] * (1 + len(prompts))))
            for line in own:
                cells = [f"{line.by_prompt[p]:.2f}" if p in line.by_prompt else "" for p in prompts]
                parts.append(_row(line.title, *cells))
    return "\n".join(parts) + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
