"""Leases: the right to write to a location, for one of several processes on one or more machines.

A lease is a file or an object that its holder rewrites every few seconds. If it does not change for a while, by the
watcher's own clock, it has expired and may be taken over; clocks are never compared. In a directory, the holder also
locks the file, so that the end of a process on the same machine is noticed at once.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from conversion_lib.errors import FerryError, OutsideFailure
from conversion_lib.storage.files import disk_error

LEASE_NAME = "lease"
"""How the names of leases in a work directory begin."""
HOLDER_VARIABLE = "FERRY_HOLDER"
HEARTBEAT_SECONDS = 5.0
"""How often a lease is rewritten. Cloud Storage allows one write per second and object."""
EXPIRED_SECONDS = 60.0
"""A lease that has not changed for this long has expired: a dozen heartbeats were missed."""
POLL_SECONDS = 1.0
SETTLING_SECONDS = 1.0
"""Without locks, two processes may write a file at the same moment. Whose note is there after this time holds it."""
LOOKING_SECONDS = 0.02
"""Longest time that a look at a file locks it."""
LARGEST_NOTE = 1 << 16
"""Bytes of a lease file that are read."""
RELEASE_SECONDS = 10.0
"""How long `release` waits for a heartbeat in progress. If it is written after that, the lease expires."""


class Note(BaseModel):
    """The content of a lease: who holds it, or how the last holder's work failed.

    Attributes:
        id: Unique for each holder.
        host: The holder's host name.
        pid: The holder's process id.
        machine: Equal for processes that see each other's locks: the same kernel and mount. Empty: in a bucket.
        heartbeat: Number of heartbeats.
        holder: Whom the process works for, such as a run in Airflow: FERRY_HOLDER of its environment.
        failure: Why the last holder failed. None: it has not.
        failure_is_final: Whether a retry by another process cannot help.
    """

    id: str
    host: str
    pid: int
    machine: str = ""
    heartbeat: int = 0
    holder: str = ""
    failure: str | None = None
    failure_is_final: bool = False

    @staticmethod
    def of_this_process() -> Note:
        """Returns a new note for this process."""
        holder = os.environ.get(HOLDER_VARIABLE, "")
        return Note(id=uuid.uuid4().hex, host=socket.gethostname(), pid=os.getpid(), holder=holder)

    @staticmethod
    def parse(content: bytes | None) -> Note | None:
        """Returns the note in `content`, or None if it is empty, damaged or half-written."""
        try:
            return Note.model_validate_json(content or b"")
        except ValidationError:
            return None

    def __str__(self) -> str:
        process = f"process {self.pid} on {self.host}"
        return f"{self.holder}, {process}" if self.holder else process


class State(Enum):
    """What a look at a lease shows. WATCHED: a process has it, and only time can tell whether it is alive."""

    FREE = "free"
    WATCHED = "watched"
    HELD = "held"


class Lease(ABC):
    """One lease, as seen by one process. The event `lost` is set if another run takes it over.

    Methods raise BadInput or OutsideFailure if the lease cannot be read or written.

    Args:
        on_lost: Called once when the lease is lost, in another thread.
    """

    descriptor = -1
    """A file descriptor that a child may inherit, to hold the lease too. Negative: there is none."""

    def __init__(self, on_lost: Callable[[], None] = lambda: None) -> None:
        self.lost = threading.Event()
        self._on_lost = on_lost
        self._note = Note.of_this_process()
        self._ended = threading.Event()
        self._heartbeats: threading.Thread | None = None
        self._seen: tuple[Any, float] | None = None
        self._writing = threading.Lock()

    @property
    def held(self) -> bool:
        """Whether this process took the lease and has not released it."""
        return self._heartbeats is not None

    @abstractmethod
    def read(self) -> Note | None:
        """Reads the lease's current note; None if there is none."""

    @abstractmethod
    def _look(self) -> State | Any:
        """Returns the state if one look shows it, else a value that changes with every heartbeat of the holder."""

    @abstractmethod
    def _take(self) -> bool:
        """Takes the lease if it has not changed since the last look, and returns whether it did."""

    @abstractmethod
    def _write(self) -> bool:
        """Writes the note, or returns False if another process has the lease by now."""

    @abstractmethod
    def _remove(self) -> None:
        """Removes what this run wrote."""

    @abstractmethod
    def discard(self) -> None:
        """Removes the lease of an expired holder."""

    def look(self) -> State:
        """Returns the lease's state. Several looks tell more: a lease that changes is held, one that does not expires.

        Raises:
            BadInput: The lease cannot be read.
            OutsideFailure: The same, and a retry may help.
        """
        found = self._look()
        if isinstance(found, State):
            self._seen = None
            return found
        if self._seen is None or self._seen[0] != found:
            changed, self._seen = self._seen is not None, (found, time.monotonic())
            return State.HELD if changed else State.WATCHED
        return State.FREE if time.monotonic() - self._seen[1] >= EXPIRED_SECONDS else State.WATCHED

    def acquire(self) -> bool:
        """Takes the lease if it is free, and returns whether it did. Does not wait.

        Raises:
            BadInput: The lease cannot be written.
            OutsideFailure: The same, and a retry may help.
        """
        if self.look() is not State.FREE or not self._take():
            return False
        self.lost.clear()
        self._ended.clear()
        self._heartbeats = threading.Thread(target=self._keep_alive, name="lease", daemon=True)
        self._heartbeats.start()
        return True

    def wait(self, waiting: Callable[[], None]) -> None:
        """Waits until this process holds the lease. If it has to wait, it calls `waiting` once before."""
        told = False
        while not self.acquire():
            if not told:
                waiting()
                told = True
            time.sleep(POLL_SECONDS)

    @contextmanager
    def waited_for(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Waits for the lease and holds it until the block ends. `waiting`: as for `wait`."""
        self.wait(waiting)
        try:
            yield
        finally:
            self.release()

    def require(self, where: str) -> None:
        """Checks that the lease is not lost.

        Args:
            where: What the lease is for, for the error message.

        Raises:
            OutsideFailure: Another run has taken the lease over.
        """
        if self.lost.is_set():
            raise OutsideFailure(f"another run took over {where} while this one was suspended: run again")

    def heartbeat(self) -> None:
        """Rewrites the lease now. If another run has taken it over, sets `lost`."""
        with self._writing:
            self._note = self._note.model_copy(update={"heartbeat": self._note.heartbeat + 1})
            if self._write() or self.lost.is_set():
                return
            self.lost.set()
        self._on_lost()

    def _keep_alive(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS) and not self.lost.is_set():
            # an outage: the next heartbeat shows whether another run has taken over in the meantime
            with suppress(OSError, FerryError):
                self.heartbeat()

    def release(self, *, failure: str | None = None, final: bool = False) -> None:
        """Releases the lease. Does nothing if it is not held.

        Args:
            failure: Left in the lease for waiting processes. None: the lease is removed.
            final: Whether a retry by a waiting process cannot help.
        """
        if self._heartbeats is None:
            return
        self._ended.set()
        self._heartbeats.join(RELEASE_SECONDS)
        self._heartbeats = None
        # if it cannot be removed, the next run sees it expire
        with suppress(OSError, FerryError):
            if failure is not None and not self.lost.is_set():
                self._note = self._note.model_copy(update={"failure": failure, "failure_is_final": final})
                self._write()
            elif not self.lost.is_set():
                self._remove()
        self._close()

    def _close(self) -> None:
        """Closes what the process has open."""
        return


class FileLease(Lease):
    """The lease in the file `path`. Its directory is made when the lease is taken."""

    def __init__(self, path: Path, on_lost: Callable[[], None] = lambda: None) -> None:
        super().__init__(on_lost)
        self._path = path
        self._content = b""
        """The file's content at the last look."""

    def read(self) -> Note | None:
        with suppress(OSError):
            return Note.parse(self._path.read_bytes())
        return None

    def _look(self) -> State | bytes:
        descriptor = self._open(os.O_RDONLY)
        if descriptor < 0:
            self._content = b""
            return State.FREE
        try:
            locked = _lock(descriptor, fcntl.LOCK_SH)
            self._content = os.pread(descriptor, LARGEST_NOTE, 0)
            if locked is False:
                return State.HELD
            note = Note.parse(self._content)
            if not self._content or (note is not None and note.failure is not None):
                return State.FREE
            if locked and note is not None and note.machine == _machine(descriptor):
                return State.FREE  # a living holder would have it locked
            return self._content
        finally:
            os.close(descriptor)

    def _open(self, flags: int) -> int:
        """Opens the file; negative if there is none, or its directory was just removed."""
        try:
            if flags & os.O_CREAT:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self._path, flags | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            return -1
        except OSError as error:
            if isinstance(error, NotADirectoryError) and not flags & os.O_CREAT:
                return -1
            raise disk_error(error, f"cannot write to {self._path.parent}") from None

    def _take(self) -> bool:
        self.descriptor = self._open(os.O_RDWR | os.O_CREAT)
        if self.descriptor < 0:
            return False
        locked = _lock(self.descriptor, fcntl.LOCK_EX)
        as_seen = os.pread(self.descriptor, LARGEST_NOTE, 0) == self._content
        if locked is False or not as_seen or not self._is_mine_to_write():
            self._close()
            return False
        fresh = {"machine": _machine(self.descriptor), "failure": None, "failure_is_final": False}
        self._note = self._note.model_copy(update=fresh)
        self._put()
        if locked is None:
            time.sleep(SETTLING_SECONDS)
            if not self._is_mine():
                self._close()
                return False
        return True

    def _is_mine(self) -> bool:
        note = self.read()
        return note is not None and note.id == self._note.id

    def _is_mine_to_write(self) -> bool:
        """Whether the path still names the open file: the last holder may have removed it."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), self._path.stat())
        except OSError:
            return False

    def _put(self) -> None:
        content = self._note.model_dump_json().encode()
        os.pwrite(self.descriptor, content, 0)
        os.ftruncate(self.descriptor, len(content))
        with suppress(OSError):
            os.fsync(self.descriptor)

    def _write(self) -> bool:
        if not self._is_mine_to_write() or not self._is_mine():
            return False
        self._put()
        return True

    def _remove(self) -> None:
        if self._is_mine_to_write():
            self._path.unlink(missing_ok=True)

    def discard(self) -> None:
        descriptor = self._open(os.O_RDONLY)
        if descriptor < 0:
            return
        # locked, so that no process takes it in between
        if _lock(descriptor, fcntl.LOCK_EX) is not False and os.pread(descriptor, LARGEST_NOTE, 0) == self._content:
            self._path.unlink(missing_ok=True)
        os.close(descriptor)

    def _close(self) -> None:
        if self.descriptor >= 0:
            with suppress(OSError):  # a process that was forked in the meantime may have the file open too
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            os.close(self.descriptor)
            self.descriptor = -1


def _lock(descriptor: int, kind: int) -> bool | None:
    """Locks the file for this process. False: another has it; None: the file system has no locks."""
    for last in (False, False, True):
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if last:
                return False
            time.sleep(LOOKING_SECONDS)  # it may be locked only for a look
        except OSError:
            return None
    return False


def _machine(descriptor: int) -> str:
    kernel = socket.gethostname()
    with suppress(OSError):
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{kernel} {os.fstat(descriptor).st_dev}"
