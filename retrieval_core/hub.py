"""Fetching one safetensors file of a hub repository, safely: checked names, checked content, and
nothing under the final name until it is whole.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import urllib.error
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from .errors import RetrievalError
from .files import read_metadata, write_text
from .hub_client import Found, UnreachableError, describe, explain, open_range

Progress = Callable[[int, int], None]

CHUNK = 1 << 20
ATTEMPTS = 4
SUFFIX = ".safetensors"


def download(
    repo_id: str,
    filename: str,
    revision: str | None,
    folder: str | os.PathLike[str],
    progress: Progress | None = None,
    endpoint: str | None = None,
) -> Path:
    """The file's path in `folder`, fetched from the hub unless the same version is there.

    It lies under `folder/owner--name/`, so that repositories never overwrite each other. Until it
    is whole and checked it has a hidden name ending in `.part`, from which a later call resumes.

    Args:
        repo_id: "owner/name". filename: of a safetensors file in it, "/" between folders.
        revision: branch, tag or commit; None or "" is the default branch. A file fetched at a
            commit is found again without asking the hub.
        progress: called with (bytes done, bytes in all); may raise to interrupt.
        endpoint: another hub's address; by default huggingface_hub's own (HF_ENDPOINT).

    Raises:
        RetrievalError: a name that is not safe, no access, no such file, no network, no room, or
            a file that arrives other than the hub describes it.
    """
    revision = (revision or "").strip() or None
    target = resolve_target(repo_id, filename, Path(folder))
    note = target.with_name(f".{target.name}.json")
    known = _read_note(note) if target.is_file() else {}
    if revision and known.get("commit") == revision:
        return target
    name = f"'{filename}' of '{repo_id}'" + (f" at '{revision}'" if revision else "")
    try:
        found = describe(repo_id, filename, revision, name, endpoint)
    except UnreachableError as error:
        if known and not revision:
            return target  # offline, and the file is here
        raise RetrievalError(
            f"The hub could not be reached for {name} ({error}); check the network, or put the "
            f"file into '{target.parent}' by hand and choose it there."
        ) from error
    source = {"etag": found.etag, "commit": found.commit}
    if known.get("etag") != found.etag:
        _fetch(found, target, name, progress, endpoint)
    if known != source:
        write_text(note, json.dumps(source))
    return target


def resolve_target(repo_id: str, filename: str, folder: Path) -> Path:
    """Where a file of a repository is kept: folder/owner--name/filename.

    Raises:
        RetrievalError: not a repository's name, not a safetensors file, or a path that leaves the
            folder.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RetrievalError(
            f"{repo_id!r} is not the name of a hub repository; write it as owner/name."
        ) from error
    parts = PurePosixPath(filename).parts
    # Hidden names are the parts and notes of this module; ".." begins with a dot, too.
    plain = all(part == part.strip() and not part.startswith((".", "/")) for part in parts)
    if not parts or not plain or any(c in '\\:*?"<>|' or ord(c) < 32 for c in filename):
        raise RetrievalError(
            f"{filename!r} is not a plain file name inside a repository; write it as "
            "file.safetensors or folder/file.safetensors."
        )
    if not filename.endswith(SUFFIX):
        raise RetrievalError(
            f"{filename!r} is not a {SUFFIX} file inside the repository; only safetensors files "
            "are fetched, because other formats can run code."
        )
    home = (folder / repo_id.replace("/", "--")).resolve()
    target = home.joinpath(*parts)
    if not target.resolve().is_relative_to(home):  # a link inside the folder leads out of it
        raise RetrievalError(
            f"'{filename}' would be written outside '{home}'; remove the link there, or choose "
            "another file."
        )
    return target


def _fetch(
    found: Found, target: Path, name: str, progress: Progress | None, endpoint: str | None
) -> None:
    """The file's bytes into `target`, by way of a part file named after its version."""
    version = hashlib.sha256(found.etag.encode()).hexdigest()[:16]
    part = target.with_name(f".{target.name}.{version}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        done = part.stat().st_size if part.is_file() else 0
        free = shutil.disk_usage(part.parent).free
        if free < found.size - done:
            raise RetrievalError(
                f"{name} needs {_mb(found.size - done)} and '{part.parent}' has {_mb(free)} left; "
                "make room first."
            )
        _transfer(found, part, name, progress, endpoint)
        _check(found, part, name)
        os.replace(part, target)
        for old in target.parent.glob(f".{target.name}.*.part"):  # of versions given up
            old.unlink(missing_ok=True)
    except RetrievalError:
        raise
    except OSError as error:
        raise RetrievalError(
            f"Could not write '{target}' ({error.strerror or error}); choose a folder that can be "
            "written, with enough room."
        ) from error


def _transfer(
    found: Found, part: Path, name: str, progress: Progress | None, endpoint: str | None
) -> None:
    """Appends to `part` until it has the file's size, going on where a connection broke."""
    reason = "the connection was closed"
    for _ in range(ATTEMPTS):
        done = part.stat().st_size if part.is_file() else 0
        if done > found.size:
            part.unlink()
            done = 0
        if progress is not None:
            progress(done, found.size)
        if done == found.size:
            part.touch()
            return
        try:
            response = open_range(found.location, done, endpoint)
        except urllib.error.HTTPError as error:
            if error.code not in (408, 416, 429) and error.code < 500:
                reason = f"HTTP {error.code}"
                break
            if error.code == 416:
                part.unlink(missing_ok=True)
            reason = f"HTTP {error.code}"
            continue
        except (OSError, http.client.HTTPException) as error:
            reason = explain(error)
            continue
        with response:
            # A server that ignores the range sends the file from its start.
            with part.open("ab" if response.status == 206 else "wb") as file:
                done = file.tell()
                while done < found.size:
                    try:
                        data = response.read(min(CHUNK, found.size - done))
                    except (OSError, http.client.HTTPException) as error:
                        reason = explain(error)
                        break
                    if not data:
                        break
                    file.write(data)
                    done += len(data)
                    if progress is not None:
                        progress(done, found.size)
    done = part.stat().st_size if part.is_file() else 0
    if done != found.size:
        raise RetrievalError(
            f"The download of {name} broke off after {_mb(done)} of {_mb(found.size)} ({reason}); "
            "run again to go on from there."
        )


def _check(found: Found, part: Path, name: str) -> None:
    """Refuses, and removes, what is not the file that the hub described."""
    wrong = ""
    if len(found.etag) == 64:  # large files are named by their SHA-256
        digest = hashlib.sha256()
        with part.open("rb") as file:
            while data := file.read(CHUNK):
                digest.update(data)
        wrong = "" if digest.hexdigest() == found.etag else "its checksum is another"
    if not wrong:
        try:
            read_metadata(part)
        except RetrievalError:
            wrong = "it is not a whole safetensors file"
    if wrong:
        part.unlink()
        raise RetrievalError(
            f"What arrived for {name} is not the file it should be ({wrong}) and was removed; try "
            "again, or another revision."
        )


def _read_note(note: Path) -> dict[str, str]:
    try:
        value = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
