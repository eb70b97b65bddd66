"""Work on files: written whole or not at all, one writer at a time, several files at once."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

from conversion_lib.errors import BadInput, FerryError, OutsideFailure

Item = TypeVar("Item")
Result = TypeVar("Result")


TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""The names of files that are being written, to be renamed when they are whole."""


def in_parallel(
    work: Callable[[Item, threading.Event], Result], items: Iterable[Item], *, threads: int
) -> list[Result]:
    """`work` for every item on `threads` threads; the results in the order of the items.

    The first failure, or an interrupt in this thread, sets the event that `work` is handed, drops what has not
    begun, waits for the rest and is raised: nothing goes on behind an error.
    """
    stopped = threading.Event()
    failures: list[BaseException] = []

    def unless_stopped(item: Item) -> Result | None:
        # the thread that failed says so itself: this one may come too late to drop what has not begun
        if stopped.is_set():
            return None
        try:
            return work(item, stopped)
        except BaseException as error:
            failures.append(error)  # before the others are told: what they raise then is a consequence
            stopped.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(unless_stopped, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException as error:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise (failures[0] if failures and isinstance(error, Exception) else error) from None
    return [cast(Result, future.result()) for future in futures]


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name of its own in the directory of `path`; what is left of it at the end is removed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` beside `path`, syncs it and renames it there: a reader sees the old file or the new one."""
    with _beside(path) as temporary:
        _write_synced(temporary, content)
        temporary.replace(path)
    sync_directory(path.parent)


def write_first(path: Path, content: bytes) -> bool:
    """Writes `path` unless it is there, and returns whether it did: of several machines at once, only one does.

    A reader sees no file or the whole. Where the file system has no hard links it is for the caller to hold a lock.
    """
    with _beside(path) as temporary:
        _write_synced(temporary, content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            if path.exists():
                return False
            temporary.replace(path)
    sync_directory(path.parent)
    return True


def copy_atomically(source: Path, destination: Path) -> None:
    """Copies a file's content so that a reader of `destination` sees the old file or the new one."""
    with _beside(destination) as temporary:
        shutil.copyfile(source, temporary)
        sync_file(temporary)
        temporary.replace(destination)


def remove_temporaries(directory: Path) -> None:
    """Removes, in `directory` and below, what kills left of files that were to be written or copied whole."""
    for path in directory.rglob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Returns when the file's content is on disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Returns when the names in the directory are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing_parent(path: Path) -> Path:
    """The nearest of `path` and its parents that exists."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


@contextmanager
def one_at_a_time(lock: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the lock file `lock`, whose directory is made, and removes it at the end.

    Another process that holds it is waited for; `waiting` is called once before. A killed holder leaves the file
    behind but not the lock. File systems without locks are taken as they are.
    """
    descriptor = _locked(lock, waiting)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(lock: Path, waiting: Callable[[], None]) -> int:
    told = False
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # the last holder removed the directory too
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told:
                waiting()
                told = True
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            return descriptor  # no locks here (some network file systems)
        # the last holder removed the file while this one waited: then the lock is on nothing
        try:
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def disk_error(error: OSError, what: str) -> FerryError:
    """One line for what a disk refused: OutsideFailure where it is full or broken, BadInput where it is not ours."""
    where = f"{error.filename}: " if error.filename else ""
    line = f"{what}: {where}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutsideFailure(f"{line}; make room and run again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return BadInput(f"{line}; give another directory or its permissions")
    return OutsideFailure(line)
