"""Runs the protocol: draws what is not drawn yet, scores it, and writes table, plot and sheet."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.prepare import load_image
from ..files import atomic_write, write_text
from ..sheets import Row, Tile, choose_colour, write_sheet
from . import summary
from .characters import Character, digest_references
from .comfy import encode
from .frontier import write_frontier
from .ledger import Ledger
from .methods import Method
from .protocol import HELD_OUT, IN_DOMAIN, Protocol, Run
from .scores import Scorer

PICTURES = "pictures"
# Rows of the sheet for each kind of characters, and pictures beside the references.
_SHEET_ROWS, _SHEET_RESULTS = 4, 8

# (runs done, runs in all)
Progress = Callable[[int, int], None]


class Evaluation:
    """One folder of results.

    Args:
        folder: where everything goes; what is there already is kept and gone on from.
        protocol, characters, scorer: what all methods in the folder share.

    Raises:
        RetrievalError: the folder holds results of another protocol, other characters, other
            pictures of them, or other scores.
    """

    def __init__(
        self, folder: Path, protocol: Protocol, characters: Sequence[Character], scorer: Scorer
    ):
        self.folder, self.protocol, self.scorer = folder, protocol, scorer
        self.characters = {character.name: character for character in characters}
        settings: dict[str, Any] = {**protocol.to_dict(), **scorer.digest}
        settings["characters"] = list(self.characters)
        for name, character in self.characters.items():
            settings[f"references of {name}"] = digest_references(character)
        self.ledger = Ledger(folder, settings)

    def run(self, method: Method, weight: float | None, on_run: Progress | None = None) -> None:
        """A method at a weight; runs that have their row are not done again."""
        done = self.ledger.done(method.name, weight, method.digest)
        runs = list(self.protocol.runs(list(self.characters)))
        for start in range(0, len(runs), method.batch):
            # A batch that a kill cut through is drawn whole again, so that its other pictures
            # come out to the last bit as they would have.
            batch = runs[start : start + method.batch]
            if not all(run.key in done for run in batch):
                drawn = method.draw(batch, self.characters, weight)
                pairs = [(r, p) for r, p in zip(batch, drawn, strict=True) if r.key not in done]
                self.ledger.append([self._row(method, weight, r, p) for r, p in pairs])
            if on_run is not None:
                on_run(min(start + method.batch, len(runs)), len(runs))

    def _row(
        self, method: Method, weight: float | None, run: Run, pictures: Tensor
    ) -> dict[str, Any]:
        character = self.characters[run.character]
        scores, answers = self.scorer.score(run, character, pictures)
        names = []
        for sample, picture in enumerate(pictures):
            name = name_picture(method.name, weight, run, sample)
            data = encode(picture)
            atomic_write(self.folder / name, lambda path, data=data: _write(path, data))
            names.append(name)
        return {
            "method": method.name,
            "weight": weight,
            "digest": method.digest,
            "character": run.character,
            "domain": character.domain,
            "prompt": run.prompt_name,
            "seed": run.seed,
            "scores": scores,
            "answers": answers,
            "pictures": names,
        }

    def report(self) -> list[Path]:
        """Writes table.csv, table.md, frontier.png and sheet.png from all rows there are."""
        lines = summary.summarise(self.ledger.rows, self.scorer)
        paths = [self.folder / n for n in ("table.csv", "table.md", "frontier.png", "sheet.png")]
        write_text(paths[0], summary.write_csv(lines))
        write_text(paths[1], summary.write_markdown(lines))
        write_frontier(paths[2], lines, self.scorer)
        rows = self._sheet_rows()
        subtitle = "Each row: one character and prompt, one seed. The numbers are weights."
        if rows:
            write_sheet(paths[3], "References and pictures", subtitle, rows)
        return paths if rows else paths[:3]

    def _sheet_rows(self) -> list[Row]:
        """The first characters of each kind, each with another prompt, by every method."""
        found = {Ledger.key(row) for row in self.ledger.rows}
        kinds = list(dict.fromkeys((row["method"], row["weight"]) for row in self.ledger.rows))
        kinds.sort(key=lambda kind: (kind[0], -1.0 if kind[1] is None else kind[1]))
        rows = []
        for domain in (IN_DOMAIN, HELD_OUT):
            own = [c for c in self.characters.values() if c.domain == domain][:_SHEET_ROWS]
            for i, character in enumerate(own):
                number = i % len(self.protocol.prompts)
                tiles = []
                for method, weight in kinds[:_SHEET_RESULTS]:
                    seed, prompt = self.protocol.seed, self.protocol.prompts[number]
                    run = Run(character.name, f"P{number + 1}", prompt, seed, 1)
                    if (method, weight, *run.key) in found:
                        picture = _read(self.folder / name_picture(method, weight, run, 0))
                        label = method if weight is None else f"{method} {weight:g}"
                        tiles.append(Tile(picture, label))
                if tiles:
                    references = [
                        Tile(r.image, r.concept, choose_colour(j))
                        for j, r in enumerate(character.references[:4])
                    ]
                    title = f"{domain}: {self.protocol.prompts[number][:110]}"
                    rows.append(Row(title, references, tiles))
        return rows


def name_picture(method: str, weight: float | None, run: Run, sample: int) -> str:
    """A picture's path in the folder, of characters that every file system takes."""
    kind = method if weight is None else f"{method}_{weight:g}"
    file = f"{run.character}_{run.prompt_name}_{run.seed}_{sample + 1}.png"
    return f"{PICTURES}/{_plain(kind)}/{_plain(file)}"


def _plain(name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")
    # Two names must not fall together.
    return plain if plain == name else f"{plain}-{sha256(name.encode()).hexdigest()[:6]}"


def _read(path: Path) -> Tensor:
    import torch

    pixels, _ = load_image(path)
    return torch.from_numpy(pixels).movedim(-1, 0).float() / 255


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def list_means(lines: Sequence[summary.Line]) -> list[Mapping[str, Any]]:
    """The lines as JSON-able dicts of means."""
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
