"""Runs the protocol: draws missing pictures, scores them, and writes table, plot and sheet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

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


class Evaluation:
    """One folder of results.

    Args:
        folder: of the results; an interrupted evaluation in it is resumed.
        protocol, characters, scorer: shared by all methods in the folder.

    Raises:
        RetrievalError: the folder holds results of another protocol, other characters, other
            pictures of them, or other scores.
    """

    def __init__(
        self, folder: Path, protocol: Protocol, characters: Sequence[Character], scorer: Scorer
    ):
        self.folder, self.protocol, self.scorer = folder, protocol, scorer
        self.characters = {character.name: character for character in characters}
        settings: dict[str, Any] = {**asdict(protocol), **scorer.digest}
        settings["characters"] = list(self.characters)
        for name, character in self.characters.items():
            settings[f"references of {name}"] = digest_references(character)
        self.ledger = Ledger(folder, settings)

    def run(self, method: Method, weight: float | None) -> None:
        """Runs a method at a weight under a progress bar, without the runs that have a row."""
        done = self.ledger.list_done(method.name, weight, method.digest)
        runs = list(self.protocol.runs(list(self.characters)))
        title = name_method(method.name, weight)
        with tqdm(desc=title, total=len(runs), unit="run", disable=None) as bar:
            for start in range(0, len(runs), method.batch):
                # An interrupted batch is drawn whole again, so that its other pictures are the
                # same to the last bit.
                batch = runs[start : start + method.batch]
                if not all(run.key in done for run in batch):
                    drawn = method.draw(batch, self.characters, weight)
                    pairs = [(r, p) for r, p in zip(batch, drawn, strict=True) if r.key not in done]
                    self.ledger.append([self._make_row(method, weight, r, p) for r, p in pairs])
                bar.update(len(batch))

    def _make_row(
        self, method: Method, weight: float | None, run: Run, pictures: Tensor
    ) -> dict[str, Any]:
        character = self.characters[run.character]
        scores, answers = self.scorer.score(run, character, pictures)
        names = []
        for sample, picture in enumerate(pictures):
            name = name_picture(method.name, weight, run, sample)
            data = encode(picture)
            atomic_write(self.folder / name, lambda path, data=data: path.write_bytes(data))
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
        """Writes table.csv, table.md, frontier.png and sheet.png from all rows."""
        lines = summary.summarise(self.ledger.rows, self.scorer)
        paths = [self.folder / n for n in ("table.csv", "table.md", "frontier.png", "sheet.png")]
        write_text(paths[0], summary.write_csv(lines))
        write_text(paths[1], summary.write_markdown(lines))
        write_frontier(paths[2], lines, self.scorer)
        rows = self._make_sheet_rows()
        subtitle = "Each row: one character and prompt, one seed. The numbers are weights."
        if rows:
            write_sheet(paths[3], "References and pictures", subtitle, rows)
        return paths if rows else paths[:3]

    def _make_sheet_rows(self) -> list[Row]:
        """The first characters of each kind, each with another prompt, by every method."""
        found = {Ledger.key(row): row for row in self.ledger.rows}
        kinds = list(dict.fromkeys((row["method"], row["weight"]) for row in self.ledger.rows))
        kinds.sort(key=lambda kind: (kind[0], -1.0 if kind[1] is None else kind[1]))
        rows = []
        for domain in (IN_DOMAIN, HELD_OUT):
            own = [c for c in self.characters.values() if c.domain == domain][:_SHEET_ROWS]
            for i, character in enumerate(own):
                number = i % len(self.protocol.prompts)
                run = character.name, f"P{number + 1}", self.protocol.seed
                tiles = []
                for kind in kinds[:_SHEET_RESULTS]:
                    if row := found.get((*kind, *run)):
                        pixels, _ = load_image(self.folder / row["pictures"][0])
                        picture = torch.from_numpy(pixels).movedim(-1, 0).float() / 255
                        tiles.append(Tile(picture, name_method(*kind)))
                if tiles:
                    references = [
                        Tile(r.image, r.concept, choose_colour(j))
                        for j, r in enumerate(character.references[:4])
                    ]
                    title = f"{domain}: {self.protocol.prompts[number][:110]}"
                    rows.append(Row(title, references, tiles))
        return rows


def name_method(method: str, weight: float | None) -> str:
    return method if weight is None else f"{method} {weight:g}"


def name_picture(method: str, weight: float | None, run: Run, sample: int) -> str:
    """A picture's path in the folder, of characters that every file system accepts."""
    kind = method if weight is None else f"{method}_{weight:g}"
    file = f"{run.character}_{run.prompt_name}_{run.seed}_{sample + 1}.png"
    return f"{PICTURES}/{_make_plain(kind)}/{_make_plain(file)}"


def _make_plain(name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")
    # Different names must stay different.
    return plain if plain == name else f"{plain}-{sha256(name.encode()).hexdigest()[:6]}"
