"""Turns a path or a URL into the location that it names. Every text that names one comes through here."""

from __future__ import annotations

import re
from pathlib import Path

from conversion_lib.errors import BadInput
from conversion_lib.storage.interface import SCHEME, Location
from conversion_lib.storage.local import LocalLocation

_URL = re.compile(
    r"[a-z][a-z0-9+.-]*:/|(gs|gcs|s3|s3a|s3n|hf|az|abfs|abfss|wasb|wasbs|hdfs|dbfs|r2|oss|https?|file):",
    re.IGNORECASE,
)
"""The beginning of a URL, also of one that was converted to a path and has lost a slash."""


def location(where: Path | str) -> Location:
    """Returns the location that a path or gs://bucket/prefix names, which need not exist.

    Raises:
        BadInput: It is another URL, or has another spelling, the bucket's or object's name is not allowed, or there
            are no credentials.
    """
    text = str(where)
    if text.startswith(SCHEME):
        from conversion_lib.storage.gcs import BucketLocation  # imports slowly because of the client

        return BucketLocation.parse(text)
    return LocalLocation(local_path(where, f"a directory or {SCHEME}bucket/prefix"))


def local_path(where: Path | str, expected: str = "a path on this machine") -> Path:
    """Returns `where` as a path. Raises BadInput for a URL, which would become a directory named `s3:`."""
    text = str(where)
    if "://" in text or _URL.match(text):
        near = text.lower().startswith(SCHEME[:3]) and not text.startswith(SCHEME)
        hint = f"; write buckets as {SCHEME}, in small letters and with two slashes" if near else ""
        raise BadInput(f"{text}: expected {expected}{hint}")
    return Path(where)
