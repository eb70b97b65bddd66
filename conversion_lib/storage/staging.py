"""How the files of one run appear all at once: built out of sight and renamed, or written in place, the marker last.

In a directory everything is built in a hidden work directory on the same file system and renamed at the end. So a
reader sees nothing or the whole, and a killed run leaves what it has done where the next one looks. In a bucket, where
nothing can be renamed, a checkpoint is whole when its marker is there: it is written last and removed first.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from conversion_lib.errors import BadInput
from conversion_lib.storage.disk import bytes_below, check_disk
from conversion_lib.storage.files import disk_error, existing_parent, remove_temporaries, sync_directory
from conversion_lib.storage.lease import LEASE_NAME

if TYPE_CHECKING:
    from conversion_lib.storage.locations import LocalLocation, Location

REPLACED_NAME = "replaced"


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


class RenameStaging:
    """A tree in the directory `root`: built in the work directory, renamed at the end."""

    def __init__(self, root: Path, tree: Tree) -> None:
        self.tree = tree
        self._root, self._work = root.absolute(), root.absolute() / tree.work
        self._final, self._build = self._root / tree.final, self._work / tree.build

    @property
    def shown(self) -> str:
        return str((self._root / self.tree.record).parent)

    @property
    def final(self) -> LocalLocation:
        return _location(self._final)

    @property
    def build(self) -> LocalLocation:
        return _location(self._build)

    @property
    def work(self) -> LocalLocation:
        return _location(self._work)

    @contextmanager
    def drafts(self) -> Iterator[Path]:
        yield self._work

    def exists(self) -> bool:
        return self._final.exists() and not _is_empty(self._final)

    def whole(self) -> bool:
        return self.exists()

    def read(self, name: str) -> bytes | None:
        return _location(self._root / name).read()

    def begun(self) -> bool:
        return self._work.is_dir()

    def building(self) -> bool:
        return self._build.exists()

    def committing(self) -> bool:
        return (self._work / REPLACED_NAME).exists()

    def strangers(self) -> list[str]:
        return sorted(_location(self._root).children() - self.tree.ours - set(self.tree.guests))

    def prepare(self, needed_bytes: int) -> None:
        self._require_one_file_system()
        if needed_bytes:
            check_disk(self._final, needed_bytes - bytes_below(self._work), ", or pass --skip-disk-check")
        try:
            self._work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, f"cannot write to {self._work.parent}") from None

    def _require_one_file_system(self) -> None:
        """What is built is renamed to its place at the end: a mount or a link to another disk would fail only then."""
        for path in (self._work, self._final):
            if path.exists() and path.stat().st_dev != existing_parent(path.parent).stat().st_dev:
                raise BadInput(
                    f"{path} lies on another file system than {path.parent}: what is built cannot be moved into place "
                    "there. Give a directory that is on one file system as a whole"
                )

    def begin(self) -> None:
        for path in self._work.iterdir():
            if not path.name.startswith(LEASE_NAME):
                _remove(path)
        self._build.mkdir(parents=True)

    def restore(self) -> None:
        """What a commit replaced comes back, unless the new was in place already."""
        replaced = self._work / REPLACED_NAME
        if not replaced.is_dir():
            return
        if self._build.exists() or not self._final.exists():
            for name in (*self.tree.dropped, self.tree.final, *self.tree.beside):
                placed = name in self.tree.beside and not (self._work / name).exists()
                if placed and (self._root / name).exists():
                    (self._root / name).rename(self._work / name)  # for the next try to place
                elif (replaced / name).exists():
                    _remove(self._root / name)
                if (replaced / name).exists():
                    (replaced / name).rename(self._root / name)
        shutil.rmtree(replaced)

    def commit(self) -> None:
        """What it replaces is moved into the work directory first, and comes back where the run ends before the new is
        in place."""
        remove_temporaries(self._work)
        if self._final.exists():
            replaced = self._work / REPLACED_NAME
            replaced.mkdir(exist_ok=True)
            # the record first: without it nothing at the destination counts as finished
            for name in (*reversed(self.tree.beside), *self.tree.dropped, self.tree.final):
                if (self._root / name).exists():
                    (self._root / name).rename(replaced / name)
        for name in self.tree.beside:
            if (self._work / name).exists():  # else an earlier try has placed it
                _remove(self._root / name)
                (self._work / name).rename(self._root / name)
        self._build.rename(self._final)
        sync_directory(self._root)
        self.clear()

    def clear(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)


def _location(path: Path) -> LocalLocation:
    from conversion_lib.storage.locations import LocalLocation

    return LocalLocation(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
