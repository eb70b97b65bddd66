"""Where checkpoints are published: one module a kind of place."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from conversion_lib.errors import BadInput
from conversion_lib.publish.destinations.base import Destination
from conversion_lib.publish.destinations.directory import DirectoryDestination


def open_destination(base: str, path: str = "") -> Destination:
    """The location `path` under `base`: gs://bucket/prefix, a directory, or file:///directory."""
    scheme, separator, rest = base.partition("://")
    if not separator:
        return DirectoryDestination(Path(base), path)
    if scheme == "gs":
        # its client takes half a second to import
        from conversion_lib.publish.destinations.cloud_storage import CloudStorageDestination

        return CloudStorageDestination(base, path)
    if scheme == "file" and rest.startswith("/"):
        return DirectoryDestination(Path(unquote(urlsplit(base).path)), path)
    raise BadInput(f"{base}: expected gs://bucket/prefix, a directory or file:///directory")
