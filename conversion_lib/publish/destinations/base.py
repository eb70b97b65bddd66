"""Where a checkpoint is published: the interface. A third kind of place is one more module beside this one.

A destination is one location. Files are put there in any order; nobody takes them for a checkpoint before `commit`.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from conversion_lib.progress import Reporter
from conversion_lib.publish.manifest import Manifest
from conversion_lib.storage.checksums import FileEntry
from conversion_lib.storage.interface import StoredObject

MANIFEST_NAME = "manifest.json"
MARKER_NAME = "ferry_commit.json"
"""What a reader looks for: written last, and only there when everything else is."""
LEASE_NAME = ".ferry_lease.json"
"""Who is publishing here."""
OWN_NAMES = frozenset({MANIFEST_NAME, MARKER_NAME, LEASE_NAME})
"""What lies at a location and is in no manifest."""
LEVELS = 3
"""A location lies at <model>/<commit>/<target> under its base."""


@dataclass(frozen=True, slots=True)
class Item:
    """A file to publish: its entry, and the file, the object or the bytes it is made from."""

    entry: FileEntry
    source: Path | bytes | StoredObject

    def open(self) -> IO[bytes]:
        if isinstance(self.source, bytes):
            return io.BytesIO(self.source)
        return self.source.open("rb")


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """What lies at <model>/<commit>/<target> under a base, whole or not.

    committed: its marker is there. touched: when something of it was last written, in seconds since 1970.
    """

    path: str
    committed: bool
    files: int
    bytes: int
    touched: float


class Destination(Protocol):
    """One location. Paths are relative to it, with `/`. Methods raise BadInput and OutsideFailure, in one line."""

    @property
    def url(self) -> str: ...

    def exclusive(self, reporter: Reporter) -> AbstractContextManager[None]:
        """Held while something is published or removed here, where the place has locks."""
        ...

    def read(self, path: str) -> bytes | None:
        """A small file of what is committed; None where there is none."""
        ...

    def begin(self, manifest: Manifest) -> dict[str, FileEntry]:
        """Makes ready, and says which of the manifest's files an earlier try has brought already."""
        ...

    def put(self, item: Item, advance: Callable[[int], None], stopped: threading.Event) -> FileEntry:
        """Brings one file, checking its CRC32C on the way; its entry as it lies here. For several threads at once."""
        ...

    def commit(self, manifest: bytes, marker: bytes) -> None:
        """Writes the manifest and then the marker: from here on readers see the checkpoint."""
        ...

    def entries(self, reporter: Reporter) -> list[FileEntry]:
        """Every file that lies here, sorted."""
        ...

    def remove(self) -> None:
        """Removes what lies here, committed or not: the marker first, so that nobody reads what is half gone."""
        ...

    def locations(self) -> list[StoredVersion]:
        """Of a base: every location under it that a publisher has begun or committed, sorted."""
        ...

    def update(self, path: str, change: Callable[[bytes | None], bytes | None]) -> None:
        """Replaces a file at `path`, relative to the base, by what `change` makes of it (None: leaves it)."""
        ...
