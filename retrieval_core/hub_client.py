"""Requests to the hub: what it says of a file, and the file's bytes.

huggingface_hub gives addresses and the user's token. The requests themselves are made here, because
in the versions of huggingface_hub that hosts bring (0.x to 2.x) no one way reports progress,
resumes, can be interrupted and shows at once that there is no network.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from typing import Any
from urllib.parse import urljoin, urlsplit

from .errors import RetrievalError

TIMEOUT = 30.0
MOST_REDIRECTS = 5


class UnreachableError(Exception):
    """No answer from the hub."""


@dataclass(frozen=True)
class Found:
    """What the hub says of a file: its version, its size in bytes, and where its bytes are."""

    etag: str
    size: int
    commit: str
    location: str


def describe(
    repo_id: str, filename: str, revision: str | None, name: str, endpoint: str | None
) -> Found:
    """Asks the hub for a file's version; one request, so that being offline shows at once."""
    from huggingface_hub import constants, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        raise UnreachableError("HF_HUB_OFFLINE is set")
    url = hf_hub_url(repo_id, filename, revision=revision, endpoint=endpoint)
    try:
        status, headers, url = _head(url, endpoint)
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(explain(error)) from error
    code = headers.get("X-Error-Code", "")
    refusals = {
        "GatedRepo": f"The repository '{repo_id}' is gated: accept its terms on its page, then log "
        "in with 'huggingface-cli login' or set HF_TOKEN.",
        "RevisionNotFound": f"The repository '{repo_id}' has no revision '{revision}'; give a "
        "branch, tag or commit that it has.",
        "EntryNotFound": f"There is no file {name}; check the file's name on the repository's "
        "page.",
    }
    if code in refusals:
        raise RetrievalError(refusals[code])
    if code == "RepoNotFound" or status in (401, 403, 404):
        raise RetrievalError(
            f"There is no repository '{repo_id}' on the hub that may be read (HTTP {status}); "
            "check the name, or set HF_TOKEN if it is private."
        )
    if status >= 400:
        raise UnreachableError(f"HTTP {status}")
    etag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
    size = headers.get("X-Linked-Size") or (headers.get("Content-Length") if status < 300 else None)
    if not etag or size is None or not size.isdigit():
        raise RetrievalError(
            f"The hub describes {name} without a version or size, so it cannot be fetched safely; "
            "download it by hand."
        )
    commit = headers.get("X-Repo-Commit", "")
    return Found(etag, int(size), commit, headers.get("Location") or url)


def _head(url: str, endpoint: str | None) -> tuple[int, Message, str]:
    """Status, headers and final address of a HEAD request.

    Redirects within the hub (a renamed repository) are followed; one to its storage is the answer.
    """
    for _ in range(MOST_REDIRECTS):
        try:
            with _opener(_Stay()).open(_request(url, endpoint, "HEAD"), timeout=TIMEOUT) as answer:
                return answer.status, answer.headers, url
        except urllib.error.HTTPError as error:
            place = error.headers.get("Location", "")
            if not 300 <= error.code < 400 or urlsplit(place).netloc:
                return error.code, error.headers, url
            url = urljoin(url, place)
    raise OSError("too many redirects")


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """No redirect is followed: it surfaces as HTTPError."""


def open_range(location: str, done: int, endpoint: str | None) -> http.client.HTTPResponse:
    """The file's bytes from `done` on."""
    request = _request(location, endpoint, "GET")
    if done:
        request.add_header("Range", f"bytes={done}-")
    return _opener().open(request, timeout=TIMEOUT)


def _request(url: str, endpoint: str | None, method: str) -> urllib.request.Request:
    """A request with the user's token, if there is one, where it is for the hub itself."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    place = urlsplit(url)
    if place.scheme not in ("http", "https"):  # urllib would also read file:// and ftp://
        raise OSError(f"the hub names an address of the kind {place.scheme!r}")
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"}, method=method)
    for key, value in build_hf_headers().items():
        secret = key.lower() == "authorization"
        # The token is not for the hub's storage, nor for where that redirects to.
        if not secret or place.netloc == urlsplit(endpoint or constants.ENDPOINT).netloc:
            request.add_unredirected_header(key, value)
    return request


def _opener(*handlers: urllib.request.BaseHandler) -> urllib.request.OpenerDirector:
    # certifi is what Python packages usually trust; some Pythons find no certificates alone.
    authorities = None
    with contextlib.suppress(ImportError):
        import certifi

        authorities = certifi.where()
    context = ssl.create_default_context(cafile=authorities)
    return urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), *handlers)


def explain(error: BaseException) -> str:
    """The first line of an error, short."""
    text = str(getattr(error, "reason", None) or error).strip() or type(error).__name__
    return text.splitlines()[0][:160].rstrip(".")
