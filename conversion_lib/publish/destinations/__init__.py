"""Where checkpoints are published: one module for each kind of destination."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from conversion_lib.errors import BadInput
from conversion_lib.publish.destinations.base import Destination
from conversion_lib.publish.destinations.directory import DirectoryDestination
from conversion_lib.storage.locations import local_path

EXPECTED = "gs://bucket/prefix, a directory or file:///directory"


def open_destination(base: str, path: str = "") -> Destination:
    """Opens a destination.

    Args:
        base: gs://bucket/prefix, a directory, or file:///directory.
        path: The location under it. Empty: the base itself.

    Raises:
        BadInput: `base` is another URL, its name is not allowed, or there are no credentials.
    """
    scheme, separator, rest = base.partition("://")
    if not separator:
        return DirectoryDestination(local_path(base, EXPECTED), path)
    if scheme == "gs":
        # importing the client takes half a second
        from conversion_lib.publish.destinations.cloud_storage import CloudStorageDestination

        return CloudStorageDestination(base, path)
    if scheme == "file" and rest.startswith("/"):
        return DirectoryDestination(Path(unquote(urlsplit(base).path)), path)
    raise BadInput(f"{base}: expected {EXPECTED}")
