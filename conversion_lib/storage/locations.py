"""From a path or a URL to the location that it names."""

from __future__ import annotations

from pathlib import Path

from conversion_lib.errors import BadInput
from conversion_lib.storage.interface import SCHEME, Location
from conversion_lib.storage.local import LocalLocation


def location(where: Path | str) -> Location:
    """The location that a path or gs://bucket/prefix names.

    Raises BadInput for another URL scheme.
    """
    text = str(where)
    if text.startswith(SCHEME):
        from conversion_lib.storage.gcs import BucketLocation  # its client takes long to import

        return BucketLocation.parse(text)
    if "://" in text:
        raise BadInput(f"{text}: expected a directory or gs://bucket/prefix")
    return LocalLocation(Path(where))
