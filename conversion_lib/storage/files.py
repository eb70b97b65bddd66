"""File operations: atomic writes, one writer at a time, work on several files in parallel."""

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


NOT_ALLOWED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
)
"""What a disk says where another try would be of no use."""
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""Names of files that are being written, to be renamed when they are complete."""


def in_parallel(
    work: Callable[[Item, threading.Event], Result], items: Iterable[Item], *, threads: int
) -> list[Result]:
    """Calls `work` for every item on several threads.

    The first failure, or an interrupt in this thread, sets the event that `work` gets and cancels what has not begun.
    It is raised when the rest has ended, so that nothing continues after an error.

    Args:
        work: Called with an item and the event. It should return soon after the event is set.
        items: What to work on.
        threads: How many items at once.

    Returns:
        The results in the order of the items.
    """
    stopped = threading.Event()
    failures: list[BaseException] = []

    def unless_stopped(item: Item) -> Result | None:
        # set by the thread that failed: the main thread may be too late to cancel what has not begun
        if stopped.is_set():
            return None
        try:
            return work(item, stopped)
        except BaseException as error:
            failures.append(error)  # before the event is set: errors of other threads after it are consequences
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
    """Yields a unique temporary path in the directory of `path`, and removes what is left there at the end."""
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
    """Writes a file durably: a reader sees the old content or the new one.

    Raises:
        OSError: Writing failed. The old file is still there.
    """
    with _beside(path) as temporary:
        _write_synced(temporary, content)
        temporary.replace(path)
    sync_directory(path.parent)


def write_first(path: Path, content: bytes) -> bool:
    """Writes a file durably unless it exists, and returns whether it did.

    A reader sees no file or all of it. Of several machines that call this at once, only one writes. On a file system
    without hard links, the caller must hold a lock for that.

    Raises:
        OSError: Writing failed.
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
    """Copies a file: a reader of `destination` sees the old content or the new one.

    Raises:
        OSError: Copying failed. The old file is still there.
    """
    with _beside(destination) as temporary:
        shutil.copyfile(source, temporary)
        sync_file(temporary)
        temporary.replace(destination)


def remove_temporaries(directory: Path) -> None:
    """Removes the temporary files that killed writers left in `directory` and below."""
    for path in directory.rglob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Waits until a file's content is on disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Waits until the names in a directory are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def expanded(path: Path | str, otherwise: str = "write the path in full") -> Path:
    """The path with the home directory for `~`. Raises BadInput where this process has none, with what can be done."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise BadInput(f"{path}: no home directory is known (HOME is not set); {otherwise}") from None


def existing_parent(path: Path) -> Path:
    """Returns `path` or its nearest parent that exists."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


@contextmanager
def one_at_a_time(lock: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds a lock file until the block ends, and removes it then.

    A killed holder leaves the file behind, but not the lock. On a file system without locks, nothing is locked.

    Args:
        lock: The lock file. Its directory is made.
        waiting: Called once before waiting for another process that holds the lock.
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
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
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
        # if the last holder removed the file while this one waited, the lock is worthless
        try:
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def disk_error(error: OSError, what: str) -> FerryError:
    """Turns an OSError into an error of one line.

    Args:
        error: What was raised.
        what: The start of the message, such as `cannot write to DIR`.

    Returns:
        BadInput if the path or its permissions are wrong; OutsideFailure if the disk is full or broken.
    """
    where = f"{error.filename}: " if error.filename else ""
    line = f"{what}: {where}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutsideFailure(f"{line}; free some space and run again")
    if error.errno == errno.ELOOP:
        return BadInput(f"{what}: {where}a symbolic link, which is not followed there; remove it")
    if error.errno in NOT_ALLOWED:
        return BadInput(f"{line}; give another directory, or change its permissions")
    return OutsideFailure(line)
