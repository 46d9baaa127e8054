"""Finds a model: in a folder, in huggingface_hub's cache, or on the hub, which it is fetched from.

Only configuration, tokenizers, templates and safetensors weights are ever fetched.
"""

from __future__ import annotations

import errno
import inspect
import json
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache, utils

from ..errors import RetrievalError, explain
from ..hub import TIMEOUT, Progress, check_repository, describe_refusal

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# InstructBLIP has the tokenizer of its Q-Former in a folder of that name.
_SMALL = re.compile(r"(qformer_tokenizer/)?[\w-][\w.-]*\.(json|txt|model|jinja)")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def find_model(name: str, progress: Progress = lambda done, total: None) -> Path:
    """The folder of a model in the format of transformers: the path of one on disk, or the name of
    a repository of the hub, see `fetch_model`.

    Raises:
        RetrievalError: neither a folder nor a name, a model that lacks a part, or see
            `fetch_model`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        check(folder)
        return folder
    check_repository(name, "neither a folder here nor")
    return fetch_model(name, progress)


def fetch_model(name: str, progress: Progress = lambda done, total: None) -> Path:
    """The folder of a hub repository, owner/name, in huggingface_hub's cache.

    Without asking the hub if the cache holds it whole; else it is fetched into the cache, resuming
    an interrupted download.

    Args:
        progress: called with (bytes done, bytes in all), at least after every file; may raise to
            interrupt. Within a file where huggingface_hub tells (2.x).

    Raises:
        RetrievalError: no such repository, a gated one, one that lacks a part, no network, or no
            room.
    """
    config = try_to_load_from_cache(name, "config.json")
    if isinstance(config, str):
        with suppress(RetrievalError):
            check(Path(config).parent)
            return Path(config).parent
    try:
        # One request, so that being offline shows at once.
        info = HfApi().model_info(name, files_metadata=True, timeout=TIMEOUT)
    except Exception as error:  # of requests or httpx, by the version
        raise _explain_refusal(name, error) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    _check_files(sizes, f"The repository '{name}'")
    # Weights last: a cache that has them all has everything.
    wanted = sorted(file for file in sizes if _SMALL.fullmatch(file))
    wanted += [WEIGHTS] if WEIGHTS in sizes else sorted(f for f in sizes if _SHARD.fullmatch(f))
    done, total = 0, sum(sizes[file] for file in wanted)
    takes_bar = "tqdm_class" in inspect.signature(hf_hub_download).parameters
    for file in wanted:
        progress(done, total)
        bar = {"tqdm_class": _make_bar(progress, done, total)} if takes_bar else {}
        try:
            path = hf_hub_download(name, file, **bar)
        except _PassedOnError as stop:
            raise stop.error from None
        except Exception as error:
            raise _explain_refusal(name, error) from error
        done += sizes[file]
        if file == "config.json":
            folder = Path(path).parent
    progress(total, total)
    check(folder)
    return folder


def check(folder: Path) -> None:
    """Checks that a folder holds a whole model.

    Raises:
        RetrievalError: it lacks a configuration, safetensors weights or a processor.
    """
    _check_files({path.name for path in folder.iterdir()}, f"The model folder '{folder}'")
    if not (folder / WEIGHTS).is_file():
        missing = [shard for shard in _list_shards(folder) if not (folder / shard).is_file()]
        if missing:
            raise RetrievalError(
                f"The model folder '{folder}' lacks {len(missing)} of its weight files, such as "
                f"{missing[0]}; fetch it again."
            )


def _check_files(names: Collection[str], what: str) -> None:
    if "config.json" not in names:
        raise RetrievalError(
            f"{what} has no config.json; give a model in the format of transformers."
        )
    if WEIGHTS not in names and INDEX not in names:
        raise RetrievalError(
            f"{what} has no {WEIGHTS}; only safetensors weights are read, because other formats "
            "can run code."
        )
    if not any(name in names for name in PROCESSORS):
        raise RetrievalError(
            f"{what} has no processor ({' or '.join(PROCESSORS)}); take the model with all of its "
            "files."
        )


def _list_shards(folder: Path) -> list[str]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RetrievalError(
            f"'{folder / INDEX}' is not an index of weight files; fetch the model again."
        ) from error


class _PassedOnError(Exception):
    """Wraps the error of a progress function, which is not an error of the download."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _make_bar(progress: Progress, before: int, total: int) -> type:
    """A progress bar of huggingface_hub that also reports to `progress`."""

    class Bar(utils.tqdm):
        seen = 0

        def update(self, n: float | None = 1) -> bool | None:
            Bar.seen += int(n or 0)
            try:
                progress(min(total, before + Bar.seen), total)
            except Exception as error:
                raise _PassedOnError(error) from error
            return super().update(n)

    return Bar


def _explain_refusal(name: str, error: Exception) -> RetrievalError:
    """One sentence on why a model could not be fetched."""
    if refusal := describe_refusal(error, f"'{name}'"):
        return RetrievalError(refusal)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return RetrievalError(
            f"There is no room left for '{name}'; make room, or set HF_HOME to a larger disk."
        )
    reason = (
        "HF_HUB_OFFLINE is set" if isinstance(error, utils.OfflineModeIsEnabled) else explain(error)
    )
    return RetrievalError(
        f"The hub could not be reached for '{name}' ({reason}); check the network, or give the "
        "path of a folder that holds the model."
    )
