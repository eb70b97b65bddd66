"""Local directories: locations in them, and how a tree is built in one and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion_lib.core.documents import read_limited
from conversion_lib.errors import BadInput
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.storage.checksums import FileEntry, entries_below
from conversion_lib.storage.disk import bytes_below, check_disk
from conversion_lib.storage.files import (
    copy_atomically,
    disk_error,
    existing_parent,
    in_parallel,
    remove_temporaries,
    sync_directory,
    write_atomically,
    write_first,
)
from conversion_lib.storage.interface import Location, Tree
from conversion_lib.storage.lease import LEASE_NAME, FileLease
from conversion_lib.storage.links import refuse_links_in
from conversion_lib.storage.logs import FileLog
from conversion_lib.storage.names import path_below

SYNC_THREADS = 8
"""Without OCDBT there are as many directories as chunks, and syncing is mostly waiting."""
REPLACED_NAME = "replaced"
"""In the work directory: what a commit replaces, until the commit is done."""


@dataclass(frozen=True)
class LocalLocation:
    """A path on a file system of this machine. See `Location`."""

    path: Path

    @property
    def spec(self) -> dict[str, Any]:
        # a path, since `%`, `#` and `?` have a meaning in a `file://` URL
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
        return LocalLocation(path_below(self.path, path))

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> bytes | None:
        try:
            return read_limited(self.path)
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
        return path_below(self.path, entry.path)

    def lease(self, on_lost: Callable[[], None] = lambda: None) -> FileLease:
        return FileLease(self.path, on_lost)

    def log(self) -> FileLog:
        return FileLog(self.path.with_name(f"{self.path.name}.jsonl"))

    def staging(self, tree: Tree) -> RenameStaging:
        return RenameStaging(self.path, tree)

    def settle(self) -> None:
        directories = {path.parent for path in self.path.rglob("*")}
        in_parallel(lambda directory, _: sync_directory(directory), directories, threads=SYNC_THREADS)


class RenameStaging:
    """A tree in the directory `root`: built in the work directory, and renamed at the end. See `Staging`."""

    def __init__(self, root: Path, tree: Tree) -> None:
        self.tree = tree
        self._root, self._work = root.absolute(), root.absolute() / tree.work
        self._final, self._build = self._root / tree.final, self._work / tree.build

    @property
    def shown(self) -> str:
        return str((self._root / self.tree.record).parent)

    @property
    def final(self) -> LocalLocation:
        return LocalLocation(self._final)

    @property
    def build(self) -> LocalLocation:
        return LocalLocation(self._build)

    @property
    def work(self) -> LocalLocation:
        return LocalLocation(self._work)

    @contextmanager
    def drafts(self) -> Iterator[Path]:
        yield self._work

    def exists(self) -> bool:
        return self._final.exists() and not _is_empty(self._final)

    def whole(self) -> bool:
        return self.exists()

    def read(self, name: str) -> bytes | None:
        return LocalLocation(self._root / name).read()

    def begun(self) -> bool:
        refuse_links_in(self._work)
        return self._work.is_dir()

    def building(self) -> bool:
        return self._build.exists()

    def committing(self) -> bool:
        return (self._work / REPLACED_NAME).exists()

    def strangers(self) -> list[str]:
        return sorted(LocalLocation(self._root).children() - self.tree.ours - set(self.tree.guests))

    def prepare(self, needed_bytes: int) -> None:
        refuse_links_in(self._work)
        self._require_one_file_system()
        if needed_bytes:
            check_disk(self._final, needed_bytes - bytes_below(self._work), ", or pass --skip-disk-check")
        try:
            self._work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, f"cannot write to {self._work.parent}") from None

    def _require_one_file_system(self) -> None:
        """Raises BadInput for a mount or a link to another disk: the rename at the end would fail there."""
        for path in (self._work, self._final):
            if path.exists() and path.stat().st_dev != existing_parent(path.parent).stat().st_dev:
                raise BadInput(
                    f"{path} is on another file system than {path.parent}, so that the result cannot be renamed into "
                    "place. Give a directory that is completely on one file system"
                )

    def begin(self) -> None:
        for path in self._work.iterdir():
            if not path.name.startswith(LEASE_NAME):
                _remove(path)
        self._build.mkdir(parents=True)

    def restore(self) -> None:
        """Puts back what an interrupted commit replaced, unless the new tree was in place already."""
        replaced = self._work / REPLACED_NAME
        if not replaced.is_dir():
            return
        if self._build.exists() or not self._final.exists():
            for name in (*self.tree.dropped, self.tree.final, *self.tree.beside):
                placed = name in self.tree.beside and not (self._work / name).exists()
                if placed and (self._root / name).exists():
                    (self._root / name).rename(self._work / name)  # the next commit puts it in place
                elif (replaced / name).exists():
                    _remove(self._root / name)
                if (replaced / name).exists():
                    (replaced / name).rename(self._root / name)
        shutil.rmtree(replaced)

    def commit(self) -> None:
        """Moves what is replaced into the work directory, then the new tree into place.

        If the run ends in between, `restore` puts back what was replaced.
        """
        remove_temporaries(self._work)
        if self._final.exists():
            replaced = self._work / REPLACED_NAME
            replaced.mkdir(exist_ok=True)
            # the record first: without it, nothing at the destination counts as finished
            for name in (*reversed(self.tree.beside), *self.tree.dropped, self.tree.final):
                if (self._root / name).exists():
                    (self._root / name).rename(replaced / name)
        for name in self.tree.beside:
            if (self._work / name).exists():  # else an earlier commit put it in place
                _remove(self._root / name)
                (self._work / name).rename(self._root / name)
        self._build.rename(self._final)
        sync_directory(self._root)
        self.clear()

    def clear(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
