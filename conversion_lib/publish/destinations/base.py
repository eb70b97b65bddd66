"""The interface of a destination. A new kind of destination is one more module beside this one.

A destination is one location. Files are put there in any order; readers do not see a checkpoint before `commit`.
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
"""What readers look for: it is written last, when everything else is there."""
LEASE_NAME = ".ferry_lease.json"
"""The lease of the run that is publishing here."""
OWN_NAMES = frozenset({MANIFEST_NAME, MARKER_NAME, LEASE_NAME})
"""Files at a location that are in no manifest."""
LEVELS = 3
"""Levels of a location under its base: <model>/<commit>/<target>."""


@dataclass(frozen=True, slots=True)
class Item:
    """A file to publish: its entry at the destination, and the file, object or bytes to copy."""

    entry: FileEntry
    source: Path | bytes | StoredObject

    def open(self) -> IO[bytes]:
        """Opens the source for reading."""
        if isinstance(self.source, bytes):
            return io.BytesIO(self.source)
        return self.source.open("rb")


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A location under a base, complete or not.

    Attributes:
        path: <model>/<commit>/<target>.
        committed: Whether its marker is there.
        files: Number of files.
        bytes: Their total size.
        touched: When a file was last written, in seconds since 1970.
    """

    path: str
    committed: bool
    files: int
    bytes: int
    touched: float


class Destination(Protocol):
    """One location. Paths are relative to it, with `/`.

    Every method raises BadInput if the location or its permissions are wrong, and OutsideFailure if the disk or the
    service fails.
    """

    @property
    def url(self) -> str:
        """The location, for messages and results."""
        ...

    def exclusive(self, reporter: Reporter) -> AbstractContextManager[None]:
        """Waits for other runs, and holds the location's lease until the block ends. Hold it to publish or remove."""
        ...

    def read(self, path: str) -> bytes | None:
        """Returns a small file of the committed location; None if there is none."""
        ...

    def begin(self, manifest: Manifest) -> dict[str, FileEntry]:
        """Prepares to publish the files of a manifest, and removes what does not belong to it.

        Returns:
            The files that an earlier try has copied already, by path.

        Raises:
            BadInput: The location holds something that Ferry did not publish.
        """
        ...

    def put(self, item: Item, advance: Callable[[int], None], stopped: threading.Event) -> FileEntry:
        """Copies one file and checks its CRC32C. Several threads may call it at once.

        Args:
            item: The file.
            advance: Called with the bytes of each block.
            stopped: Ends the copy early.

        Returns:
            Its entry at the location.

        Raises:
            OutsideFailure: The file changed while it was copied, or another run publishes here.
        """
        ...

    def commit(self, manifest: bytes, marker: bytes) -> None:
        """Writes the manifest and then the marker, from which on readers see the checkpoint.

        Raises:
            OutsideFailure: Another run has taken the lease over.
        """
        ...

    def entries(self, reporter: Reporter) -> list[FileEntry]:
        """Returns every file at the location, sorted by path."""
        ...

    def remove(self) -> None:
        """Removes the location, committed or not. The marker goes first, so that readers never see half of it."""
        ...

    def locations(self) -> list[StoredVersion]:
        """Returns every begun or committed location under a base, sorted by path."""
        ...

    def update(self, path: str, change: Callable[[bytes | None], bytes | None]) -> None:
        """Replaces a file atomically.

        Args:
            path: Relative to the base.
            change: Gets the old content, or None if there is no file. Returns the new content, or None to leave it.
                It may be called several times.
        """
        ...
