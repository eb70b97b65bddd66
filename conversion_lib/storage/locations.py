"""Turns a path or a URL into the location that it names."""

from __future__ import annotations

from pathlib import Path

from conversion_lib.errors import BadInput
from conversion_lib.storage.interface import SCHEME, Location
from conversion_lib.storage.local import LocalLocation


def location(where: Path | str) -> Location:
    """Returns the location that a path or gs://bucket/prefix names, which need not exist.

    Raises:
        BadInput: It is another URL, the bucket's or object's name is not allowed, or there are no credentials.
    """
    text = str(where)
    if text.startswith(SCHEME):
        from conversion_lib.storage.gcs import BucketLocation  # imports slowly because of the client

        return BucketLocation.parse(text)
    if "://" in text:
        raise BadInput(f"{text}: expected a directory or gs://bucket/prefix")
    return LocalLocation(Path(where))
