"""Where a checkpoint is built: a directory, or a prefix in a bucket of Cloud Storage. What a sink needs of either."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from conversion_lib.errors import BadInput
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.storage.checksums import FileEntry, entries_below
from conversion_lib.storage.files import copy_atomically, in_parallel, sync_directory, write_atomically, write_first
from conversion_lib.storage.lease import FileLease, Lease
from conversion_lib.storage.logs import FileLog, Log
from conversion_lib.storage.staging import RenameStaging, Staging, Tree

SCHEME = "gs://"
SYNC_THREADS = 8
"""Without OCDBT there are as many directories as chunks, and syncing one is mostly waiting."""


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
class LocalLocation:
    """A path on a file system of this machine."""

    path: Path

    @property
    def spec(self) -> dict[str, Any]:
        # a path, since a `file://` URL would read `%`, `#` and `?` as its own
        return {"driver": "file", "path": f"{self.path}/"}

    @property
    def handle(self) -> Path:
        return self.path

    @property
    def local(self) -> Path:
        return self.path

    @property
    def parent(self) -> LocalLocation:
        return LocalLocation(self.path.parent)

    def absolute(self) -> LocalLocation:
        return LocalLocation(self.path.absolute())

    def __truediv__(self, path: str) -> LocalLocation:
        return LocalLocation(self.path / path)

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, content: bytes) -> None:
        write_atomically(self.path, content)

    def write_first(self, content: bytes) -> bool:
        return write_first(self.path, content)

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def below(self) -> list[str]:
        return [path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if not path.is_dir()]

    def children(self) -> set[str]:
        return {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()

    def versions(self) -> Iterator[tuple[str, int, int]]:
        for parent, directories, names in os.walk(self.path):
            directories.sort()
            for name in sorted(names):
                path = Path(parent, name)
                stat = path.stat()
                yield str(path.relative_to(self.path)), stat.st_size, stat.st_mtime_ns

    def copy_to(self, path: Path) -> None:
        if self.path.is_file():
            copy_atomically(self.path, path)

    def remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            (self.path / path).unlink(missing_ok=True)

    def entries(
        self, *, sums: Location | None = None, reporter: Reporter = SILENT, task: str = "reading"
    ) -> list[FileEntry]:
        kept = sums.path if isinstance(sums, LocalLocation) else None
        return entries_below(self.path, sums=kept, reporter=reporter, task=task) if self.path.is_dir() else []

    def stored(self, entry: FileEntry) -> Path:
        return self.path / entry.path

    def lease(self, on_lost: Callable[[], None] = lambda: None) -> FileLease:
        return FileLease(self.path, on_lost)

    def log(self) -> FileLog:
        return FileLog(self.path.with_name(f"{self.path.name}.jsonl"))

    def staging(self, tree: Tree) -> RenameStaging:
        return RenameStaging(self.path, tree)

    def settle(self) -> None:
        directories = {path.parent for path in self.path.rglob("*")}
        in_parallel(lambda directory, _: sync_directory(directory), directories, threads=SYNC_THREADS)


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
