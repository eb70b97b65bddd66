"""Turns the Hub client's errors into messages of one line, without tokens and signed URLs."""

from __future__ import annotations

import errno
import re
from urllib.parse import urlsplit

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from conversion_lib.core.retry import Passing
from conversion_lib.errors import BadInput, FerryError, OutsideFailure
from conversion_lib.storage.files import disk_error


def explain(error: Exception, what: str, repo: str, endpoint: str) -> FerryError:
    """Returns the project error to raise instead of the client's error.

    Args:
        error: What the client raised.
        what: What was requested, for the message.
        repo: The repository, such as `Qwen/Qwen3-0.6B`.
        endpoint: The Hub's URL. User and password are left out of the message.

    Returns:
        Passing if a retry may help, otherwise BadInput or OutsideFailure. A project error is returned unchanged.
    """
    # the client wraps the error of a HEAD request in one of these two
    wrapped = isinstance(error, LocalEntryNotFoundError | ValueError) and not isinstance(error, HfHubHTTPError)
    if wrapped and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, FerryError):
        return error
    if isinstance(error, HfHubHTTPError):
        return _explain_answer(error, what, repo, endpoint)
    if isinstance(error, HFValidationError):
        return BadInput(f"{repo!r} is not the name of a repository: expected NAME or OWNER/NAME")
    if isinstance(error, OfflineModeIsEnabled):
        return BadInput(f"{what} cannot be fetched while HF_HUB_OFFLINE is set: unset it, or give a local directory")
    if isinstance(error, httpx2.LocalProtocolError | UnicodeEncodeError):  # its text may contain the token
        return BadInput(f"{what}: cannot send the request; is there a stray character in HF_TOKEN?")
    if isinstance(error, OSError) and (error.errno in (errno.ENOSPC, errno.EDQUOT) or error.filename is not None):
        return disk_error(error, what)
    if isinstance(error, httpx2.HTTPError | OSError | RuntimeError):  # RuntimeError: from Xet's client
        return Passing(f"{what} from {shown_endpoint(endpoint)}: {_one_line(error)}")
    if isinstance(error, ValueError | TypeError | KeyError):
        return BadInput(f"{what}: {shown_endpoint(endpoint)} does not answer as a Hub does ({_one_line(error)})")
    return OutsideFailure(f"{what} from {shown_endpoint(endpoint)}: {_one_line(error)}")


def shown_endpoint(endpoint: str) -> str:
    """Returns the endpoint without its user and password, for messages."""
    parts = urlsplit(endpoint)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _explain_answer(error: HfHubHTTPError, what: str, repo: str, endpoint: str) -> FerryError:
    hub, status = shown_endpoint(endpoint), error.response.status_code
    if isinstance(error, GatedRepoError):
        return BadInput(
            f"{repo} is gated: accept its terms at {hub}/{repo}, and put a token of the same account in HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return BadInput(f"{what}: no such revision at {hub}; give a branch, a tag or a full commit id")
    if isinstance(error, RepositoryNotFoundError):
        return BadInput(
            f"{repo}: no such repository at {hub}, or a private one; check the name, and put a token that can read it"
            " in HF_TOKEN"
        )
    # a file server refuses an expired signed URL: the next try gets a new one
    elsewhere = urlsplit(str(error.response.url)).hostname != urlsplit(endpoint).hostname
    if status in (408, 429) or status >= 500 or elsewhere:
        return Passing(f"{what} from {hub}: HTTP {status}", _asked_seconds(error.response.headers.get("Retry-After")))
    if status in (401, 403):
        return BadInput(f"{what}: {hub} refuses access (HTTP {status}); put a token that can read it in HF_TOKEN")
    return BadInput(f"{what}: {hub} answers with HTTP {status}; check HF_ENDPOINT and the name")


def _asked_seconds(retry_after: str | None) -> float:
    """Returns the seconds of a Retry-After header; 0 if there is none, or for a date, which the Hub does not send."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        return 0.0


def _one_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__} {re.sub(r'[a-z]+://[^ ]+', '...', first)[:200]}".strip()
