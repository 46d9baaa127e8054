"""The rows of an evaluation as a table: means over characters with their standard errors."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..metrics.statistics import Estimate, estimate_mean
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
    # Sorted by weight, not by time, so that a resumed run gives the same table.
    methods = list(dict.fromkeys(row["method"] for row in rows))
    domains = [IN_DOMAIN, HELD_OUT]

    def rank(key: tuple) -> tuple:
        method, weight, domain = key
        return methods.index(method), -1.0 if weight is None else weight, domains.index(domain)

    return [_summarise_group(*key, groups[key], scorer) for key in sorted(groups, key=rank)]


def _summarise_group(
    method: str, weight: float | None, domain: str, rows: Sequence[Row], scorer: Scorer
) -> Line:
    rows = sorted(rows, key=lambda r: (r["character"], r["prompt"], r["seed"]))
    # name of a score -> character -> values
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    conditionings: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        for name, found in row["scores"].items():
            values[name][row["character"]] += found
        conditionings[row["character"], row["prompt"]].append(row)
    by_prompt = defaultdict(list)
    for (character, prompt), own in conditionings.items():
        if sum(len(row["pictures"]) for row in own) < 2:
            continue
        answers = {
            question: [answer for row in own for answer in row["answers"][question]]
            for question in own[0]["answers"]
        }
        similarity = [s for row in own for s in row["scores"][scorer.similarity]]
        found = scorer.diversity(answers, similarity)
        if found is None:
            continue
        values[DIVERSITY][character].append(found.score.mean)
        by_prompt[prompt].append(found.score.mean)
        if found.weighted is not None:
            values[WEIGHTED][character].append(found.weighted.mean)
    first = [scorer.similarity, scorer.text]
    scores = {
        name: estimate_mean([float(np.mean(v)) for v in values[name].values()])
        for name in sorted(values, key=lambda n: first.index(n) if n in first else len(first))
    }
    pictures = sum(len(row["pictures"]) for row in rows)
    means = {prompt: float(np.mean(v)) for prompt, v in sorted(by_prompt.items())}
    return Line(method, weight, domain, pictures, scores, means)


def list_means(lines: Sequence[Line]) -> list[Mapping[str, Any]]:
    """The lines as dicts of means that JSON can hold."""
    return [
        {
            "method": line.method,
            "weight": line.weight,
            "characters": line.domain,
            "pictures": line.pictures,
            **{name: round(estimate.mean, 3) for name, estimate in line.scores.items()},
        }
        for line in lines
    ]


def write_csv(lines: Sequence[Line]) -> str:
    """The table as CSV, with a column for each mean and each standard error."""
    names, prompts = _list_columns(lines)
    columns = ["method", "weight", "characters", "pictures"]
    columns += [column for name in names for column in (name, f"{name} standard error")]
    columns += [f"diversity {prompt}" for prompt in prompts]
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for line in lines:
        row = {"method": line.method, "characters": line.domain, "pictures": line.pictures}
        if line.weight is not None:
            row["weight"] = f"{line.weight:g}"
        for name, one in line.scores.items():
            row[name] = f"{one.mean:.4f}"
            row[f"{name} standard error"] = f"{one.standard_error:.4f}"
        row |= {f"diversity {prompt}": f"{mean:.4f}" for prompt, mean in line.by_prompt.items()}
        writer.writerow(row)
    return file.getvalue()


def write_markdown(lines: Sequence[Line]) -> str:
    """The table as Markdown: mean ± standard error over characters, in percent."""
    names, prompts = _list_columns(lines)
    parts = ["All numbers in percent: mean ± standard error over characters."]
    for domain in (IN_DOMAIN, HELD_OUT):
        own = [line for line in lines if line.domain == domain]
        if not own:
            continue
        parts += ["", f"## {domain} characters", "", *_make_head("method", "pictures", *names)]
        for line in own:
            cells = [str(line.scores.get(name, "")) for name in names]
            parts.append(_join_cells(line.title, str(line.pictures), *cells))
        if prompts:
            head = _make_head("method", *prompts)
            parts += ["", "Diversity by prompt (as Table 4):", "", *head]
            for line in own:
                cells = [f"{line.by_prompt[p]:.2f}" if p in line.by_prompt else "" for p in prompts]
                parts.append(_join_cells(line.title, *cells))
    return "\n".join(parts) + "\n"


def _list_columns(lines: Sequence[Line]) -> tuple[list[str], list[str]]:
    """The names of scores in their first line's order, and the names of prompts."""
    names = list(dict.fromkeys(name for line in lines for name in line.scores))
    return names, sorted({prompt for line in lines for prompt in line.by_prompt})


def _make_head(*names: str) -> tuple[str, str]:
    return _join_cells(*names), _join_cells(*["---"] * len(names))


def _join_cells(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
