"""Downloads one safetensors file of a hub repository into the models folder.

huggingface_hub makes the requests; names and content are checked here, and nothing has the final
name until it is whole.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_url, utils
from huggingface_hub.file_download import http_get

from .errors import RetrievalError, explain
from .files import read_metadata, write_text

Progress = Callable[[int, int], None]

TIMEOUT = 30.0
# No part begins with a dot: ".." leaves the folder, and hidden names are those of this module.
FILENAME = r"(\w[\w .,+=()-]*/)*\w[\w .,+=()-]*\.safetensors"


def download(
    repo_id: str,
    filename: str,
    revision: str | None,
    folder: str | os.PathLike[str],
    progress: Progress,
) -> Path:
    """Downloads a file to `folder/owner--name/filename` unless the same version is there.

    Until it is whole and checked it has a hidden name ending in `.part`, from which a later call
    resumes. Without a network, a file of the default branch that is there is used.

    Args:
        repo_id: "owner/name". filename: of a safetensors file in it, "/" between folders.
        revision: branch, tag or commit; None is the default branch. A file downloaded at a commit
            is found again without a request.
        progress: called with (bytes done, bytes in all); may raise to interrupt.

    Raises:
        RetrievalError: an unsafe name, no access, no such file, no network, no room, or something
            else than a safetensors file.
    """
    target = resolve_target(repo_id, filename, Path(folder))
    note = target.with_name(f".{target.name}.json")
    known = json.loads(note.read_text()) if target.is_file() and note.is_file() else {}
    if revision and known.get("commit") == revision:
        return target
    name = f"'{filename}' of '{repo_id}'" + (f" at '{revision}'" if revision else "")
    try:
        # One request without retries, so that being offline shows at once.
        info = HfApi().model_info(repo_id, revision=revision, timeout=TIMEOUT, files_metadata=True)
    except Exception as error:  # of requests or httpx, by the version
        refusal = describe_refusal(error, f"for {name}")
        if known and not revision and not refusal:
            return target
        raise RetrievalError(
            refusal
            or f"The hub could not be reached for {name} ({explain(error)}); check the network, "
            f"or put the file into '{target.parent}' by hand and choose it there."
        ) from error
    found = next((file for file in info.siblings or [] if file.rfilename == filename), None)
    if found is None:
        raise RetrievalError(f"There is no file {name}; check its name on the repository's page.")
    if known.get("blob") != found.blob_id:
        url = hf_hub_url(repo_id, filename, revision=info.sha)
        part = target.with_name(f".{target.name}.{found.blob_id}.part")
        _fetch(url, found.size, part, target, name, progress)
    write_text(note, json.dumps({"blob": found.blob_id, "commit": info.sha}))
    return target


def resolve_target(repo_id: str, filename: str, folder: Path) -> Path:
    """The path of a repository's file on disk: folder/owner--name/filename.

    Raises:
        RetrievalError: an unsafe name, or a link that leaves the folder.
    """
    check_repository(repo_id)
    if not re.fullmatch(FILENAME, filename):
        raise RetrievalError(
            f"{filename!r} is not the plain name of a safetensors file inside a repository; write "
            "it as file.safetensors or folder/file.safetensors (other formats can run code)."
        )
    home = (folder / repo_id.replace("/", "--")).resolve()
    target = home / filename
    if not target.resolve().is_relative_to(home):  # a link inside the folder leads out of it
        raise RetrievalError(
            f"'{filename}' would be written outside '{home}'; remove the link there, or choose "
            "another file."
        )
    return target


def check_repository(name: str, nothing_else: str = "not") -> None:
    """Refuses what is not the name of a hub repository, nor what else the name could mean."""
    with suppress(utils.HFValidationError):
        utils.validate_repo_id(name)
        if "/" in name:
            return
    raise RetrievalError(
        f"{name!r} is {nothing_else} the name of a hub repository; write it as owner/name."
    )


class _PartFile(io.BufferedWriter):
    """A file that is appended to and reports its size; `stop` is what `report` raised."""

    def __init__(self, path: Path, report: Callable[[int], None]):
        super().__init__(io.FileIO(path, "ab"))
        self.report = report
        self.stop: Exception | None = None

    def write(self, data: Any) -> int:
        written = super().write(data)
        try:
            self.report(self.tell())
        except Exception as error:
            self.stop = error
            raise
        return written


def _fetch(url: str, size: int, part: Path, target: Path, name: str, progress: Progress) -> None:
    """Downloads what `part` lacks, checks that it is a safetensors file, and renames it."""
    file = None
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with _PartFile(part, lambda done: progress(done, size)) as file:
            done = file.tell()
            if shutil.disk_usage(part.parent).free < size - done:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            headers = utils.build_hf_headers()
            http_get(url, file, resume_size=done, headers=headers, expected_size=size)
        read_metadata(part)
        os.replace(part, target)
    except RetrievalError as error:
        part.unlink()
        raise RetrievalError(
            f"What arrived for {name} is not a whole safetensors file and was removed; try again, "
            "or another revision."
        ) from error
    except Exception as error:
        if file and error is file.stop:
            raise
        if part.is_file() and part.stat().st_size > size:  # resumed from a server without ranges
            part.unlink()
        if isinstance(error, OSError) and error.strerror:
            raise RetrievalError(
                f"Could not write '{target}' ({error.strerror}); choose a folder that can be "
                f"written and has {size / 1e6:.1f} MB left."
            ) from error
        raise RetrievalError(
            describe_refusal(error, f"for {name}")
            or f"The download of {name} broke off ({explain(error)}); run again to go on from "
            "there."
        ) from error


def describe_refusal(error: Exception, which: str) -> str | None:
    """The sentence on what the hub refused; None where it could not be reached.

    Args:
        which: the repository, as it follows that word: "'owner/name'" or "for 'file' of ...".
    """
    refusals = {
        utils.GatedRepoError: f"The repository {which} is gated: accept its terms on its page, "
        "then log in with 'huggingface-cli login' or set HF_TOKEN.",
        utils.RepositoryNotFoundError: f"There is no repository {which} on the hub that may be "
        "read; check the name, or set HF_TOKEN if it is private.",
        utils.RevisionNotFoundError: f"There is no such revision {which}; give a branch, tag or "
        "commit that the repository has.",
    }
    return next((text for kind, text in refusals.items() if isinstance(error, kind)), None)
