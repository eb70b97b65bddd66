"""What directories and buckets have in common: locations of files, and the atomic commit of a tree of files.

In a directory, a tree is built in a hidden work directory on the same file system and renamed at the end. So a reader
sees nothing or all of it, and the next run finds what a killed run left. In a bucket, where nothing can be renamed, a
tree is complete when its marker is there: it is written last and removed first.

Methods for a bucket raise BadInput if its name or the credentials are wrong, and OutsideFailure if the service fails;
methods for a directory raise OSError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from conversion_lib.progress import SILENT, Reporter
from conversion_lib.storage.checksums import FileEntry
from conversion_lib.storage.lease import Lease
from conversion_lib.storage.logs import Log

SCHEME = "gs://"


class StoredObject(Protocol):
    """A file in Cloud Storage: one generation of one object."""

    bucket: str
    name: str
    generation: int

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Opens this generation for reading."""
        ...


class Location(Protocol):
    """The location of a file or a directory, which need not exist. A bucket has no directories, only names."""

    @property
    def spec(self) -> dict[str, Any]:
        """TensorStore's kvstore spec of the directory."""
        ...

    @property
    def handle(self) -> Path | str:
        """The path or URL, for other libraries."""
        ...

    @property
    def local(self) -> Path | None:
        """The path on a file system of this machine; None for a bucket."""
        ...

    @property
    def parent(self) -> Location:
        """The directory that contains it."""
        ...

    def absolute(self) -> Location:
        """Returns the same location, independent of the working directory."""
        ...

    def __truediv__(self, path: str) -> Location:
        """What has that name below. Raises BadInput as `names.safe_path` does: no name leads out."""
        ...

    def read(self) -> bytes | None:
        """Returns the file's content, or None if there is no such file."""
        ...

    def write(self, content: bytes) -> None:
        """Writes the file durably: a reader sees the old content or the new one."""
        ...

    def write_first(self, content: bytes) -> bool:
        """Writes the file durably unless it exists, and returns whether it did. Of several at once, only one does."""
        ...

    def make(self) -> None:
        """Makes the directory and its parents, if the storage has directories."""
        ...

    def below(self) -> list[str]:
        """Returns the relative path of every file in the directory and below."""
        ...

    def children(self) -> set[str]:
        """Returns the names of files and directories directly below; none if there is nothing."""
        ...

    def versions(self) -> Iterator[tuple[str, int, int]]:
        """Yields for every file below, in a fixed order: relative path, bytes, and a number that a change changes."""
        ...

    def copy_to(self, path: Path) -> None:
        """Copies the file to a local path. Does nothing if it is a directory or does not exist."""
        ...

    def remove(self, paths: Iterable[str]) -> None:
        """Removes files below, by relative path. Files that do not exist are ignored."""
        ...

    def entries(
        self, *, sums: Location | None = None, reporter: Reporter = SILENT, task: str = "reading"
    ) -> list[FileEntry]:
        """Returns every file in the directory and below with size and CRC32C, sorted by path.

        Args:
            sums: A file that keeps CRC32Cs that were computed by reading, so that the next call need not read again.
            reporter: Shows the progress.
            task: The name of the progress.
        """
        ...

    def stored(self, entry: FileEntry) -> Path | StoredObject:
        """Returns the file below that has this entry, to copy it."""
        ...

    def lease(self, on_lost: Callable[[], None] = ...) -> Lease:
        """Returns the lease in this file; `on_lost` is called in another thread if another run takes it over."""
        ...

    def log(self) -> Log:
        """Returns the log of this name."""
        ...

    def staging(self, tree: Tree) -> Staging:
        """Returns the staging that builds and commits `tree` in this directory."""
        ...

    def settle(self) -> None:
        """Waits until the names of files written below are durable too."""
        ...


@dataclass(frozen=True)
class Tree:
    """The names in one directory that are committed together.

    Attributes:
        final: Appears when the run commits.
        record: The file that says which run wrote it.
        work: The hidden work directory of the run.
        build: Where in `work` `final` is built, if it can be renamed.
        beside: Names next to `final` that are written before it is complete, the record last if it is one of them.
        dropped: Names next to `final` that are removed when it is replaced.
        markers: Files that tell readers that `final` is complete. Empty: `final` itself does.
        notes: Files in `work` that identify the run. They are removed last.
        guests: Names of other tools' files that a run leaves alone.
        alone: Whether the directory is for this tree alone. Other files in it are then refused.
    """

    final: str
    record: str
    work: str
    build: str
    beside: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    guests: tuple[str, ...] = ()
    alone: bool = True

    @property
    def ours(self) -> frozenset[str]:
        """The names in the directory that belong to the tree."""
        return frozenset({self.final, self.work, *self.beside, *self.dropped})


class Staging(Protocol):
    """One tree at one destination. Before calling a method that changes it, hold the destination's lease alone."""

    tree: Tree

    @property
    def shown(self) -> str:
        """The destination, for messages."""
        ...

    @property
    def final(self) -> Location:
        """Where the committed tree appears."""
        ...

    @property
    def build(self) -> Location:
        """Where `final` is built."""
        ...

    @property
    def work(self) -> Location:
        """The work directory, which keeps what later runs need."""
        ...

    def drafts(self) -> AbstractContextManager[Path]:
        """Opens a local directory for files that go beside `final`. Of several writers of a file, the first wins."""
        ...

    def exists(self) -> bool:
        """Whether there is anything at `final`."""
        ...

    def whole(self) -> bool:
        """Whether readers find a complete tree at `final`."""
        ...

    def read(self, name: str) -> bytes | None:
        """Returns a file at the destination by its name in the tree, or None if there is none."""
        ...

    def begun(self) -> bool:
        """Whether a run has left anything in the work directory. Raises BadInput where that is a link or has one."""
        ...

    def building(self) -> bool:
        """Whether a tree is being built and is not committed."""
        ...

    def committing(self) -> bool:
        """Whether the tree at `final` is being replaced right now."""
        ...

    def strangers(self) -> list[str]:
        """Returns other names at the destination, sorted, without guests."""
        ...

    def prepare(self, needed_bytes: int) -> None:
        """Makes the work directory.

        Args:
            needed_bytes: Disk space of the whole run, including what is in the work directory. 0: not checked.

        Raises:
            BadInput: The destination cannot be written, spans two file systems, or has too little space.
        """
        ...

    def begin(self) -> None:
        """Removes what earlier runs left, so that a new run starts empty."""
        ...

    def restore(self) -> None:
        """Undoes an interrupted commit."""
        ...

    def commit(self) -> None:
        """Moves what was built into place, and removes the work directory. After an interruption, call it again."""
        ...

    def clear(self) -> None:
        """Removes what an unfinished run left. A complete tree stays."""
        ...
