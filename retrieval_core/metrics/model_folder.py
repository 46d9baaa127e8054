"""Finds a model: in a folder, in huggingface_hub's cache, or on the hub, which it is fetched from.

Only configuration, tokenizers, templates and safetensors weights are ever fetched.
"""

from __future__ import annotations

import errno
import inspect
import json
import re
from collections.abc import Callable, Collection
from os import PathLike
from pathlib import Path

from ..errors import RetrievalError, explain

TIMEOUT = 30.0
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# InstructBLIP has the tokenizer of its Q-Former in a folder of that name.
_SMALL = re.compile(r"(qformer_tokenizer/)?[\w-][\w.-]*\.(json|txt|model|jinja)")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")

Progress = Callable[[int, int], None]


def find_model(
    name: str | PathLike[str],
    progress: Progress | None = None,
    cache_dir: str | PathLike[str] | None = None,
    endpoint: str | None = None,
) -> Path:
    """The folder of a model in the format of transformers.

    A folder on disk; else a hub name owner/name that huggingface_hub's cache holds whole, without
    asking the hub; else it is fetched into that cache, resuming an interrupted download.

    Args:
        name: path of a folder, or owner/name.
        progress: called with (bytes done, bytes in all), at least after every file; may raise to
            interrupt. Within a file where huggingface_hub tells (2.x).
        cache_dir, endpoint: huggingface_hub's own by default (HF_HOME, HF_ENDPOINT).

    Raises:
        RetrievalError: neither a folder nor a name, a model that lacks a part, no such repository,
            a gated one, no network, or no room.
    """
    text = str(name).strip()
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        check(folder)
        return folder
    _check_name(text)
    return _find_cached(text, cache_dir) or _fetch(text, progress, cache_dir, endpoint)


def check(folder: Path) -> None:
    """Checks that a folder holds a whole model.

    Raises:
        RetrievalError: it lacks a configuration, safetensors weights or a processor.
    """
    if not folder.is_dir():
        raise RetrievalError(f"There is no folder '{folder}'; check the model's path.")
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


def _check_name(text: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
        if "/" in text:
            return
    except HFValidationError:
        pass
    raise RetrievalError(
        f"{text!r} is neither a folder here nor the name of a hub repository; write it as "
        "owner/name, or give the path of a folder."
    )


def _find_cached(name: str, cache_dir: str | PathLike[str] | None) -> Path | None:
    """The model's folder in the cache; None if it is missing or incomplete."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        check(folder)
    except RetrievalError:
        return None
    return folder


def _fetch(
    name: str,
    progress: Progress | None,
    cache_dir: str | PathLike[str] | None,
    endpoint: str | None,
) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        # One request, so that being offline shows at once.
        info = HfApi(endpoint=endpoint).model_info(name, files_metadata=True, timeout=TIMEOUT)
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
        if progress is not None:
            progress(done, total)
        bar = {"tqdm_class": _make_bar(progress, done, total)} if takes_bar and progress else {}
        try:
            path = hf_hub_download(name, file, cache_dir=cache_dir, endpoint=endpoint, **bar)
        except _PassedOnError as stop:
            raise stop.error from None
        except Exception as error:
            raise _explain_refusal(name, error) from error
        done += sizes[file]
        if file == "config.json":
            folder = Path(path).parent
    if progress is not None:
        progress(total, total)
    check(folder)
    return folder


class _PassedOnError(Exception):
    """Wraps the error of a progress function, which is not an error of the download."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _make_bar(progress: Progress, before: int, total: int) -> type:
    """A progress bar of huggingface_hub that also reports to `progress`."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
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
    from huggingface_hub.utils import OfflineModeIsEnabled

    from ..hub import describe_refusal

    if refusal := describe_refusal(error, f"'{name}'"):
        return RetrievalError(refusal)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return RetrievalError(
            f"There is no room left for '{name}'; make room, or set HF_HOME to a larger disk."
        )
    reason = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else explain(error)
    return RetrievalError(
        f"The hub could not be reached for '{name}' ({reason}); check the network, or give the "
        "path of a folder that holds the model."
    )
