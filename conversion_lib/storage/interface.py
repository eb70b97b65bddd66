"""What a directory and a bucket have in common: locations of files, and how a tree of them appears all at once.

In a directory a tree is built in a hidden work directory on the same file system and renamed at the end. So a reader
sees nothing or the whole, and a killed run leaves what it has done where the next one looks. In a bucket, where nothing
can be renamed, a tree is whole when its marker is there: it is written last and removed first.
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
    """A file that lies in Cloud Storage: one generation of one object."""

    bucket: str
    name: str
    generation: int

    def open(self, mode: Literal["rb"]) -> IO[bytes]: ...


class Location(Protocol):
    """A file or a directory, by its path from there; a bucket has no directories, so that none need be made."""

    @property
    def spec(self) -> dict[str, Any]:
        """TensorStore's spec of the directory."""
        ...

    @property
    def handle(self) -> Path | str:
        """What other libraries are given: a path, or the URL."""
        ...

    @property
    def local(self) -> Path | None:
        """Its path, where it lies on a file system of this machine."""
        ...

    @property
    def parent(self) -> Location: ...

    def absolute(self) -> Location:
        """The same, whatever the working directory is later."""
        ...

    def __truediv__(self, path: str) -> Location: ...

    def read(self) -> bytes | None:
        """The file's content, None where there is no such file."""
        ...

    def write(self, content: bytes) -> None:
        """Writes the file, durably: a reader sees the old one or the new one."""
        ...

    def write_first(self, content: bytes) -> bool:
        """Writes the file unless it is there, and says whether: of several machines at once, only one does."""
        ...

    def make(self) -> None:
        """Makes the directory where there have to be any."""
        ...

    def below(self) -> list[str]:
        """Every file in the directory and below, by its path from here."""
        ...

    def children(self) -> set[str]:
        """The names directly below, of files and of directories; none where there is nothing."""
        ...

    def versions(self) -> Iterator[tuple[str, int, int]]:
        """Of every file below, in a fixed order: its path from here, its bytes, and what a change of it changes."""
        ...

    def copy_to(self, path: Path) -> None:
        """Copies the file into one of this machine; a directory, or what is not there, is passed over."""
        ...

    def remove(self, paths: Iterable[str]) -> None:
        """Removes those of the files below that are there."""
        ...

    def entries(
        self, *, sums: Location | None = None, reporter: Reporter = SILENT, task: str = "reading"
    ) -> list[FileEntry]:
        """Every file in the directory and below with its size and CRC32C, sorted.

        sums: where the CRC32C of files is kept that had to be read for this, so that the next call need not.
        """
        ...

    def stored(self, entry: FileEntry) -> Path | StoredObject:
        """The file below with this entry, to be copied."""
        ...

    def lease(self, on_lost: Callable[[], None] = ...) -> Lease:
        """The right to write that the file stands for."""
        ...

    def log(self) -> Log:
        """The log that is kept under this name."""
        ...

    def staging(self, tree: Tree) -> Staging:
        """How the files of `tree` are built in this directory, and committed."""
        ...

    def settle(self) -> None:
        """Returns when the names of what was written below are durable as well."""
        ...


@dataclass(frozen=True)
class Tree:
    """What is committed together in one directory, by names in it.

    final: what appears when the run commits. record: the file that says which run wrote it.
    work: the hidden directory of the run; build: where in it `final` is built, if it can be renamed.
    beside: names next to `final` that are written before it is whole; the record, where it is one of them, comes last.
    dropped: names next to `final` that go when it is replaced.
    markers: files by which readers take `final` for whole; None: the directory itself.
    notes: files in `work` that tell whose the run is: where files are removed one by one, they go last.
    guests: names of others that a run leaves alone.
    alone: whether the directory is this tree's own: then anything else in it is refused.
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
        return frozenset({self.final, self.work, *self.beside, *self.dropped})


class Staging(Protocol):
    """One tree at one destination. Methods that change anything are for whoever holds the destination alone."""

    tree: Tree

    @property
    def shown(self) -> str:
        """What a person calls the destination."""
        ...

    @property
    def final(self) -> Location: ...

    @property
    def build(self) -> Location:
        """Where `final` is built."""
        ...

    @property
    def work(self) -> Location:
        """Where a run keeps what later ones read."""
        ...

    def drafts(self) -> AbstractContextManager[Path]:
        """A directory in which to write what is to lie beside `final`; of several writers, the first's stays."""
        ...

    def exists(self) -> bool:
        """Whether anything lies at `final`."""
        ...

    def whole(self) -> bool:
        """Whether readers find something whole at `final`."""
        ...

    def read(self, name: str) -> bytes | None:
        """A file at the destination, by its name in the tree; None where there is none."""
        ...

    def begun(self) -> bool:
        """Whether a run has left anything in the work directory."""
        ...

    def building(self) -> bool:
        """Whether something is being built, and not committed."""
        ...

    def committing(self) -> bool:
        """Whether what is at `final` is just being replaced."""
        ...

    def strangers(self) -> list[str]:
        """What else lies at the destination that is nobody's guest, sorted."""
        ...

    def prepare(self, needed_bytes: int) -> None:
        """Makes the work directory. Raises BadInput where the destination does not allow what is to come.

        needed_bytes: what the run will take on disk, less what is in the work directory; 0: not checked.
        """
        ...

    def begin(self) -> None:
        """Clears away what earlier runs left, so that a new one finds nothing of theirs."""
        ...

    def restore(self) -> None:
        """Undoes a commit that was ended midway."""
        ...

    def commit(self) -> None:
        """Puts what was built where it belongs, and removes the work directory. Can be called again if ended midway."""
        ...

    def clear(self) -> None:
        """Removes what an unfinished run left. What is whole stays."""
        ...
