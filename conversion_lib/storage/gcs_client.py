"""The Cloud Storage client: how it is opened, what it retries, and how its errors are explained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import google.auth.exceptions
from google.api_core import exceptions
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY

from conversion_lib.errors import BadInput, FerryError, OutsideFailure

RETRY = DEFAULT_RETRY.with_timeout(600.0)
"""For every request: exponential from 1 s to 60 s, with jitter, for ten minutes. Then the caller gets the error."""
LONGEST_NAME = 1024
"""Bytes of an object's name in UTF-8."""
BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
"""Names of buckets have 3 to 63 characters, with dots up to 222."""


def split_url(url: str) -> tuple[str, str]:
    """Splits gs://bucket/prefix into the bucket and the prefix, without slashes at its ends.

    Raises:
        BadInput: It is another URL.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme != "gs" or not bucket:
        raise BadInput(f"{url}: expected gs://bucket/prefix")
    if not BUCKET_NAME.fullmatch(bucket):
        raise BadInput(
            f"{url}: {bucket!r} cannot name a bucket: expected at least 3 lower-case letters, digits, dots, dashes or"
            " underscores, the first and the last of them a letter or a digit"
        )
    return bucket, prefix.strip("/")


def open_bucket(name: str) -> Any:
    """Opens a bucket with the application default credentials. No request is made yet.

    Raises:
        BadInput: There are no credentials, or the name is not allowed.
    """
    with explained(f"gs://{name}", "open"):
        opened = storage.Client(project=None)
        opened._http.hooks["response"].append(_read_refusal)
        return opened.bucket(name)


def _read_refusal(answer: Any, **_: Any) -> None:
    """Reads the body of an answer that is an error while the request can still be tried again.

    The client reads it later, for its message: a connection that breaks there ends the call without another try, be it
    only to say that an object does not exist.
    """
    if not answer.ok:
        _ = answer.content


def require_name(name: str, url: str) -> None:
    """Checks that Cloud Storage allows this name for an object.

    Args:
        name: The object's name in its bucket.
        url: The location, for the error message.

    Raises:
        BadInput: The name is not allowed.
    """
    if len(name.encode()) > LONGEST_NAME:
        raise BadInput(
            f"{url}/{name[-60:]}: Cloud Storage allows names of up to {LONGEST_NAME} bytes: give a shorter prefix"
        )
    if "\r" in name or "\n" in name or name.startswith(".well-known/acme-challenge/"):
        raise BadInput(f"Cloud Storage does not allow an object named {name!r}: give another prefix")


def read(blob: Any) -> bytes | None:
    """Reads an object, or returns None if there is none.

    Raises:
        NotFound: There is no bucket.
    """
    try:
        return bytes(blob.download_as_bytes(retry=RETRY))
    except exceptions.NotFound as error:
        if "bucket does not exist" in str(error):
            raise
        return None


def delete(blob: Any) -> None:
    """Deletes this generation of an object. Does nothing if it is gone or replaced by now."""
    try:
        blob.delete(if_generation_match=blob.generation, retry=RETRY)
    except (exceptions.NotFound, exceptions.PreconditionFailed):
        return


@contextmanager
def explained(url: str, doing: str) -> Iterator[None]:
    """Turns the client's errors in the block into errors of one line.

    Args:
        url: The location, for the message.
        doing: What failed, for the message, such as `read`.

    Raises:
        BadInput: No credentials, no permission, no such bucket, or a bad request.
        OutsideFailure: Any other failure: a retry may help.
    """
    bucket = url.removeprefix("gs://").partition("/")[0]
    try:
        yield
    except FerryError:
        raise
    except (google.auth.exceptions.DefaultCredentialsError, google.auth.exceptions.InvalidOperation) as error:
        raise BadInput(
            f"no credentials for gs://{bucket}: run `gcloud auth application-default login`, or set"
            " GOOGLE_APPLICATION_CREDENTIALS"
        ) from error
    except google.auth.exceptions.RefreshError as error:
        if getattr(error, "retryable", False):
            raise OutsideFailure(f"cannot {doing} in {url}: {_line(error)}") from error
        raise BadInput(f"the credentials for gs://{bucket} were refused: {_line(error)}") from error
    except exceptions.NotFound as error:
        raise BadInput(f"cannot {doing} in {url}: no bucket {bucket}, or the object is gone") from error
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise BadInput(
            f"cannot {doing} in {url}: the credentials do not allow it (HTTP {error.code}); they need"
            " storage.objects.create, get, list and delete"
        ) from error
    except exceptions.BadRequest as error:
        raise BadInput(f"cannot {doing} in {url}: {_line(error)}") from error
    except ValueError as error:  # the client's own check of a bucket's name
        raise BadInput(f"{url}: {_line(error)}") from error
    except (exceptions.GoogleAPIError, google.auth.exceptions.GoogleAuthError, DataCorruption, OSError) as error:
        raise OutsideFailure(f"cannot {doing} in {url}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """Returns the service's message if the error contains its response, else the first line of the error."""
    if isinstance(error, exceptions.RetryError) and (status := _status(error.cause)):
        return f"HTTP {status} at every try, until the time for retries was over"
    said = re.search(r'"message": "((?:[^"\\]|\\.)*)"', str(error))
    return (said[1] if said else (str(error).splitlines() or [type(error).__name__])[0])[:300]


def _status(error: Any) -> int | None:
    """Returns the HTTP status of either of the client's two kinds of errors."""
    return getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
