"""The right to write to a location, for one of several processes on one machine or many.

A lease is a file or an object that its holder rewrites every few seconds. One that has not changed for a while, by the
clock of whoever watches it, has expired and may be taken over; no two clocks are compared. In a directory the holder
also locks the file, so that the end of a process on the same machine is known at once.
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
HEARTBEAT_SECONDS = 5.0
"""How often a lease is rewritten. Cloud Storage takes one write of an object a second."""
EXPIRED_SECONDS = 60.0
"""A lease that has not changed for this long has expired: a dozen heartbeats missed."""
POLL_SECONDS = 1.0
SETTLING_SECONDS = 1.0
"""Without locks, two may write a file at the same moment: the one that is there after this while holds the lease."""
LOOKING_SECONDS = 0.02
"""How long a look at a file locks it, at most."""
LARGEST_NOTE = 1 << 16
RELEASE_SECONDS = 10.0
"""How long `release` waits for a heartbeat under way. One that is written after all expires."""


class Note(BaseModel):
    """What a lease says: who holds it, or how the last holder's work failed.

    machine: what processes share that see each other's locks: one kernel, and one mount of the file system.
    """

    id: str
    host: str
    pid: int
    machine: str = ""
    heartbeat: int = 0
    failure: str | None = None
    failure_is_final: bool = False
    """Whether nobody else need try."""

    @staticmethod
    def of_this_process() -> Note:
        return Note(id=uuid.uuid4().hex, host=socket.gethostname(), pid=os.getpid())

    @staticmethod
    def parse(content: bytes | None) -> Note | None:
        """The note in `content`; None where it is none, or is just being written."""
        try:
            return Note.model_validate_json(content or b"")
        except ValidationError:
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class State(Enum):
    """What a look at a lease says. WATCHED: somebody's; whether they are alive only time can tell."""

    FREE = "free"
    WATCHED = "watched"
    HELD = "held"


class Lease(ABC):
    """One lease, as one process sees it. `lost` is set where another run has taken it over.

    on_lost: called once where that happens, in another thread.
    """

    descriptor = -1
    """A file that a child may inherit to hold the lease as well; negative where there is none."""

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
        """Whether this process took it and has not released it."""
        return self._heartbeats is not None

    @abstractmethod
    def read(self) -> Note | None:
        """What the lease says now; None where there is none."""

    @abstractmethod
    def _look(self) -> State | Any:
        """A state where one look tells; else what changes with every heartbeat of the holder."""

    @abstractmethod
    def _take(self) -> bool:
        """Takes the lease where it is still as it was looked at, and says whether."""

    @abstractmethod
    def _write(self) -> bool:
        """Writes the note; False where the lease is another's by now."""

    @abstractmethod
    def _remove(self) -> None:
        """Removes what this run wrote."""

    @abstractmethod
    def discard(self) -> None:
        """Removes the lease of an expired holder."""

    def look(self) -> State:
        """Who holds the lease. A look after a look tells more: what has changed is alive, what has not may expire."""
        found = self._look()
        if isinstance(found, State):
            self._seen = None
            return found
        if self._seen is None or self._seen[0] != found:
            changed, self._seen = self._seen is not None, (found, time.monotonic())
            return State.HELD if changed else State.WATCHED
        return State.FREE if time.monotonic() - self._seen[1] >= EXPIRED_SECONDS else State.WATCHED

    def acquire(self) -> bool:
        """Takes the lease where nobody holds it, and says whether; does not wait.

        Raises BadInput and OutsideFailure where it cannot be written.
        """
        if self.look() is not State.FREE or not self._take():
            return False
        self.lost.clear()
        self._ended.clear()
        self._heartbeats = threading.Thread(target=self._keep_alive, name="lease", daemon=True)
        self._heartbeats.start()
        return True

    def wait(self, waiting: Callable[[], None]) -> None:
        """Returns when this process holds the lease; calls `waiting` once where it has to wait."""
        told = False
        while not self.acquire():
            if not told:
                waiting()
                told = True
            time.sleep(POLL_SECONDS)

    @contextmanager
    def waited_for(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Holds the lease, once nobody else does."""
        self.wait(waiting)
        try:
            yield
        finally:
            self.release()

    def require(self, where: str) -> None:
        """Raises OutsideFailure where another run has taken the lease over."""
        if self.lost.is_set():
            raise OutsideFailure(f"another run took {where} over while this one was stopped: run again")

    def heartbeat(self) -> None:
        """Rewrites the lease now, unless another run has taken it over: then it is lost."""
        with self._writing:
            self._note = self._note.model_copy(update={"heartbeat": self._note.heartbeat + 1})
            if self._write() or self.lost.is_set():
                return
            self.lost.set()
        self._on_lost()

    def _keep_alive(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS) and not self.lost.is_set():
            # an outage: the next heartbeat tells whether another run has taken over meanwhile
            with suppress(OSError, FerryError):
                self.heartbeat()

    def release(self, *, failure: str | None = None, final: bool = False) -> None:
        """Gives the lease back. failure: left in its place for those that wait; final: nobody else need try."""
        if self._heartbeats is None:
            return
        self._ended.set()
        self._heartbeats.join(RELEASE_SECONDS)
        self._heartbeats = None
        # where it cannot be removed, the next run sees it expire
        with suppress(OSError, FerryError):
            if failure is not None and not self.lost.is_set():
                self._note = self._note.model_copy(update={"failure": failure, "failure_is_final": final})
                self._write()
            elif not self.lost.is_set():
                self._remove()
        self._close()

    def _close(self) -> None:
        """Lets go of what the process has open."""
        return


class FileLease(Lease):
    """The lease in the file `path`, whose directory is made."""

    def __init__(self, path: Path, on_lost: Callable[[], None] = lambda: None) -> None:
        super().__init__(on_lost)
        self._path = path
        self._content = b""
        """What the file said at the last look."""

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
                return State.FREE  # its lock would not be free if its holder lived
            return self._content
        finally:
            os.close(descriptor)

    def _open(self, flags: int) -> int:
        """The file; negative where there is none, or its directory was just removed."""
        try:
            if flags & os.O_CREAT:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self._path, flags, 0o644)
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
        """Whether the path still leads to the open file: the last holder may have removed it."""
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
        # locked, so that nobody takes it in between
        if _lock(descriptor, fcntl.LOCK_EX) is not False and os.pread(descriptor, LARGEST_NOTE, 0) == self._content:
            self._path.unlink(missing_ok=True)
        os.close(descriptor)

    def _close(self) -> None:
        if self.descriptor >= 0:
            with suppress(OSError):  # a process that was forked meanwhile may have the file open as well
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            os.close(self.descriptor)
            self.descriptor = -1


def _lock(descriptor: int, kind: int) -> bool | None:
    """Locks the file for this process: False where another has it, None where the file system has no locks."""
    for last in (False, False, True):
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if last:
                return False
            time.sleep(LOOKING_SECONDS)  # it may have been locked for a look alone
        except OSError:
            return None
    return False


def _machine(descriptor: int) -> str:
    kernel = socket.gethostname()
    with suppress(OSError):
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{kernel} {os.fstat(descriptor).st_dev}"
