"""Configuration of a training run: a TOML file, flags and the paper's presets.

A later source wins: defaults, presets in the order given, the file, flags. Each field of
`RunConfig` is a key of the file, and a flag of the same name with hyphens.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import RetrievalError, explain
from ..sampling.noise_schedule import Prediction
from .settings import Lock

# Settings that may change between two starts of a run: they do not change its result.
_FREE = {
    "base", "data", "out", "network", "vae", "text_encoder", "tokenizer", "preset", "batch_size",
    "accumulate", "checkpoint_activations", "checkpoint_every", "keep_checkpoints", "sheet_every",
    "clip", "dino", "workers", "cache", "decoder_rank",
}  # fmt: skip
CACHE = Path.home() / ".cache" / "retrieval_controlnet"

# §5.1, §5.4. A run may name several: ("compose-9k", "lock-decoder").
PRESETS: dict[str, dict[str, Any]] = {
    f"{name}-{steps // 1000}k": {
        "task": task, "steps": steps, "lock": "train_both", "text_drop": 0.5, "references": 4,
    }
    for name, task in (("recon", "same character"), ("compose", "composition"))
    for steps in (9000, 45000)
}  # fmt: skip
PRESETS |= {
    "lock-decoder": {"lock": "lock_decoder"},
    "lock-both": {"lock": "lock_both"},
    "text-drop-0.3": {"text_drop": 0.3},
    "text-drop-0.5": {"text_drop": 0.5},
    "text-drop-0.8": {"text_drop": 0.8},
}
# Past the paper, for data sets with part labels: what made references come over in the fewest
# steps on paper dolls.
PRESETS["part-labels"] = {
    "targets": 4, "copied_rate": 0.6, "part_weight": 1.0, "correspondence": 0.2,
    "reconstruction": 0.3, "noise_power": 0.6,
}  # fmt: skip

_POSITIVE = "a finite number above 0"
_SHARE = "from 0 to 1"


def _option(help: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RunConfig:
    """All settings of a training run.

    Raises RetrievalError naming the first setting that is out of range.
    """

    base: Path = _option("checkpoint of SD 1.5, SD 2.x or SDXL, a safetensors file")
    data: Path = _option("data set made by 'python -m retrieval_core.data build'")
    out: Path = _option("folder of the run: checkpoints, logs and the network")
    network: Path | None = _option("file of the trained network (in the run's folder)", None)
    vae: Path | None = _option("VAE: a safetensors file or diffusers' folder (the base's)", None)
    text_encoder: Path | None = _option(
        "text encoder: a folder of transformers or diffusers (the base's)", None
    )
    tokenizer: str | None = _option(
        "CLIP tokenizer: a folder, or a name in the hub's cache (openai/clip-vit-large-patch14)",
        None,
    )
    preset: tuple[str, ...] = _option(
        f"named settings, the paper's first: {', '.join(PRESETS)}", ()
    )

    task: Literal["same character", "composition", "both"] = _option("see §3.3", "same character")
    composition_share: float = _option("of the targets, for the task 'both'", 0.5)
    references: int = _option("references of a target; of a composition, half are faces", 4)
    targets: int = _option("targets of one outfit that share their references", 1)
    views: int = _option("random views of each picture and concept in the cache", 4)
    size: int | None = _option(
        "edge of targets and references in pixels (the base's: 512, of SD 2.x 768, of SDXL 1024)",
        None,
    )
    text_drop: float = _option("probability of an empty prompt", 0.5)
    reference_drop: float = _option("probability of no references", 0.05)
    remove_background: float = _option("probability of filling a reference's background", 0.5)

    lock: Lock = _option("what is not trained (§5.4)", "train_both")
    rank: int | None = _option("of low-rank training of encoder and decoder (full)", None)
    decoder_rank: int | None = _option(
        "of the products that the file has of the decoder's difference (that of rank, or whole)",
        None,
    )
    token_budget: Literal["automatic"] | int | None = _option(
        "most tokens of the bank at a site", "automatic"
    )
    query_pooling: int | None = _option("at full-resolution sites, 1 to 8 (the base's)", None)

    steps: int = _option("optimiser steps", 9000)
    batch_size: int = _option("items (targets with references) of a process in one pass", 4)
    accumulate: int = _option("passes of an optimiser step", 1)
    learning_rate: float = _option("highest learning rate", 1e-5)
    copied_rate: float = _option(
        "learning rate of encoder and decoder, copies of trained layers, for 1 of the others", 1.0
    )
    warmup_steps: int = _option("steps of linear warm-up", 100)
    optimizer: Literal["adamw", "adamw-fused", "adamw-8bit"] = _option(
        "8 bits need bitsandbytes", "adamw"
    )
    weight_decay: float = _option("AdamW's", 0.01)
    clip_norm: float = _option("largest norm of the gradient", 1.0)
    ema_decay: float | None = _option("of the weights' average, 'none' for no average", 0.999)
    precision: Literal["float32", "bf16", "fp16"] = _option("of forward and backward pass", "bf16")
    checkpoint_activations: bool = _option("computes activations twice to save memory", False)

    face_weight: float = _option("lambda of equation 1", 1.0)
    part_weight: float = _option("weight of equation 1 over each labelled part", 0.0)
    correspondence: float = _option(
        "weight of the loss that directs attention to the same part, by part labels", 0.0
    )
    reconstruction: float = _option(
        "weight of the loss that predicts the target's features from the retrieved ones", 0.0
    )
    noise_power: float = _option(
        "timesteps are drawn as steps * u ** power; below 1, high noise more often", 1.0
    )
    min_snr: float | None = _option("gamma of the min-SNR weights, such as 5 (none)", None)
    noise_offset: float = _option("strength of the noise's common part, such as 0.05", 0.0)
    zero_terminal_snr: bool | None = _option(
        "schedule without signal at its last step (the base's)", None
    )
    prediction: Prediction | None = _option("what the base predicts (detected)", None)

    seed: int = _option("of all randomness", 0)
    checkpoint_every: int = _option("steps between checkpoints", 1000)
    keep_checkpoints: int = _option("newest checkpoints that are kept", 2)
    sheet_every: int | None = _option("steps between sample sheets, 'none' for no sheets", 1000)
    clip: str | None = _option(
        "CLIP that scores the sheets: a folder, or a name on the hub (no score)", None
    )
    dino: str | None = _option("DINO, likewise", None)
    workers: int = _option("processes that read batches", 2)
    cache: Path = _option("folder of cached latents and prompts", CACHE / "latents")

    def __post_init__(self) -> None:
        def check(name: str, good: bool, wanted: str) -> None:
            if not good:
                raise RetrievalError(
                    f"The training setting {self.name_setting(name)} is {getattr(self, name)}; it "
                    f"must be {wanted}."
                )

        for name in (
            "references", "targets", "views", "steps", "batch_size", "accumulate",
            "checkpoint_every", "keep_checkpoints", "rank", "decoder_rank", "token_budget",
            "sheet_every",
        ):  # fmt: skip
            value = getattr(self, name)
            check(name, not isinstance(value, int) or value >= 1, "1 or more")
        for name in ("composition_share", "text_drop", "reference_drop", "remove_background"):
            check(name, 0 <= getattr(self, name) <= 1, _SHARE)
        for name in ("learning_rate", "copied_rate", "clip_norm", "min_snr", "noise_power"):
            value = getattr(self, name)
            check(name, value is None or 0 < value < math.inf, _POSITIVE)
        for name in (
            "weight_decay", "face_weight", "part_weight", "correspondence", "reconstruction",
            "noise_offset",
        ):  # fmt: skip
            check(name, 0 <= getattr(self, name) < math.inf, "a finite number of 0 or more")
        good = self.size is None or (self.size >= 64 and self.size % 8 == 0)
        check("size", good, "a multiple of 8 of 64 or more")
        check("query_pooling", self.query_pooling in (None, *range(1, 9)), "1 to 8")
        below = f"from 0 to below steps, {self.steps}"
        check("warmup_steps", 0 <= self.warmup_steps < self.steps, below)
        check("ema_decay", self.ema_decay is None or 0 <= self.ema_decay < 1, "from 0 to below 1")
        check("seed", 0 <= self.seed < 2**63, "from 0 to below 2**63")
        check("workers", self.workers >= 0, "0 or more")
        if self.task != "same character":
            check("references", self.references >= 2, "2 or more for faces and bodies")
        if self.lock == "lock_both" and self.rank is not None:
            raise RetrievalError(
                f"The rank {self.rank} has no effect with lock_both, which trains neither encoder "
                "nor decoder; leave it out or choose lock_decoder or train_both."
            )
        if self.lock != "train_both" and self.decoder_rank is not None:
            raise RetrievalError(
                f"The decoder_rank {self.decoder_rank} has no effect with {self.lock}, which does "
                "not train the decoder; leave it out or choose train_both."
            )
        if self.optimizer == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise RetrievalError(
                "The optimizer adamw-8bit needs the package bitsandbytes, which is not installed; "
                "install it or choose adamw-fused."
            )

    def name_setting(self, field: str) -> str | None:
        """What a field is called where the user sets it; None if it cannot be set there."""
        return field

    def as_json(self) -> dict[str, Any]:
        """All settings as plain JSON values."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
        } | {"preset": list(self.preset)}

    def list_fixed(self) -> dict[str, Any]:
        """The settings that decide what a run's result is, as plain JSON values."""
        return {name: value for name, value in self.as_json().items() if name not in _FREE}


_KINDS = get_type_hints(RunConfig)


def read_config(given: Sequence[str] | None = None) -> RunConfig:
    """The configuration of a command line: a TOML file and flags, both optional.

    Raises RetrievalError for a file that cannot be read, and for an unknown, missing or wrong key.
    """
    parser = argparse.ArgumentParser(
        prog="python -m retrieval_core.training",
        description="Trains a Retrieval ControlNet; a flag wins over the file's key.",
    )
    parser.add_argument("config", type=Path, nargs="?", metavar="RUN.toml")
    for entry in fields(RunConfig):
        how: dict[str, Any]
        if entry.name == "preset":
            how = {"nargs": "+", "metavar": "PRESET"}
        elif bool in _list_kinds(entry.name):
            how = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"metavar": _describe_kind(entry.name)}
        default = entry.default not in (MISSING, None, ()) and f" ({entry.default})"
        parser.add_argument(
            f"--{entry.name.replace('_', '-')}",
            default=None,
            help=f"{entry.metadata['help']}{default or ''}",
            **how,
        )
    flags = vars(parser.parse_args(given))
    path = flags.pop("config")
    values = {} if path is None else read_toml(path)
    return make_config(values | {name: v for name, v in flags.items() if v is not None})


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file; RetrievalError if it cannot be read."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RetrievalError(
            f"The configuration '{path}' cannot be read ({explain(error)}); give a TOML file with "
            "lines such as 'steps = 9000'."
        ) from error


def make_config(values: Mapping[str, Any]) -> RunConfig:
    """The configuration of keys with values of TOML or text of flags.

    Raises RetrievalError for unknown, missing or wrong ones.
    """
    unknown = sorted(values.keys() - _KINDS.keys())
    if unknown:
        raise RetrievalError(
            f"There is no training setting {unknown[0]!r}; 'python -m retrieval_core.training "
            "--help' lists all."
        )
    parsed = {name: _parse(name, value) for name, value in values.items()}
    chosen: dict[str, Any] = {}
    for preset in parsed.get("preset", ()):
        if preset not in PRESETS:
            raise RetrievalError(
                f"There is no preset {preset!r}; choose from {', '.join(PRESETS)}."
            )
        chosen |= PRESETS[preset]
    chosen |= parsed
    for name in ("base", "data", "out"):
        if name not in chosen:
            raise RetrievalError(
                f"The training setting {name} is missing; write {name} = '...' into the file or "
                f"give --{name}."
            )
    return RunConfig(**chosen)


def _list_kinds(name: str) -> tuple[Any, ...]:
    """The alternatives of a field's type: Literals as their values, other types as they are."""
    kind = _KINDS[name]
    union = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    listed: list[Any] = []
    for one in union:
        listed += get_args(one) if get_origin(one) is Literal else [one]
    return tuple(listed)


def _describe_kind(name: str) -> str:
    words = {int: "NUMBER", float: "NUMBER", Path: "PATH", str: "NAME", NoneType: "none"}
    return "|".join(one if isinstance(one, str) else words[one] for one in _list_kinds(name))


def _parse(name: str, value: Any) -> Any:
    """A value of TOML, or a flag's text, as the field's type."""
    kinds = _list_kinds(name)
    if name == "preset":
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list) and all(isinstance(one, str) for one in names):
            return tuple(names)
        kinds = tuple(PRESETS)
    elif NoneType in kinds and value == "none":
        return None
    elif isinstance(value, bool):
        if bool in kinds:
            return value
    elif isinstance(value, str) and value in kinds:
        return value
    else:
        for kind in kinds:
            if kind in (Path, str) and isinstance(value, str):
                return kind(value) if kind is str else Path(value).expanduser()
            if kind in (int, float) and isinstance(value, (str, int, kind)):
                try:
                    return kind(value)
                except ValueError:
                    pass
    words = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "'none'"}
    words |= {Path: "a path", str: "a name"}
    wanted = [repr(one) if isinstance(one, str) else words[one] for one in kinds]
    raise RetrievalError(
        f"The training setting {name} is {value!r}; it must be {' or '.join(wanted)}."
    )
