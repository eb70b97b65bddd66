"""Which of several processes, on one machine or many, writes at a place that they share.

A claim is a file that its holder has locked and rewrites every few seconds. Where the kernel knows the lock, a holder
that died is known at once. Where it may not (another machine, a file system without locks), a claim that has not
changed for a while, by the clock of whoever watches it, counts as left.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ValidationError

from conversion_lib.storage.files import disk_error

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""Unchanged for so long, a claim of another machine counts as left: a dozen beats missed."""

SETTLING_SECONDS = 1.0
"""Without locks, two may write a claim at the same moment: the one that is there after this while holds it."""


def _kernel() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


class Note(BaseModel):
    """What a claim says: who holds it.

    machine: what processes share that see each other's locks: one kernel, and one mount of the file system.
    failure: how the holder's work ended, where it ended badly.
    """

    id: str
    host: str
    pid: int
    machine: str
    beat: int = 0
    failure: str | None = None
    failure_is_final: bool = False
    """Whether nobody else need try."""

    @staticmethod
    def of_this_process(machine: str, failure: str | None = None, failure_is_final: bool = False) -> Note:
        return Note(
            id=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=machine,
            failure=failure,
            failure_is_final=failure_is_final,
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Claim:
    """The claim in the file `path`. on_lost is called, in another thread, where somebody else has taken it over."""

    def __init__(self, path: Path, on_lost: Callable[[], None], *, stale_seconds: float = STALE_SECONDS) -> None:
        self._path, self._on_lost, self._stale = path, on_lost, stale_seconds
        self._note = Note.of_this_process(_kernel())
        self._descriptor = -1
        self._ended = threading.Event()
        self._beats: threading.Thread | None = None
        self._watched: tuple[bytes, float] = (b"", 0.0)

    @property
    def descriptor(self) -> int:
        """The file, while the claim is held: a child that inherits it holds the lock as well."""
        return self._descriptor

    def read(self) -> Note | None:
        """What the file says now; None where there is none, or it is just being written."""
        with suppress(OSError, ValidationError):
            return Note.model_validate_json(self._path.read_bytes())
        return None

    def take(self) -> bool:
        """Takes the claim where nobody holds it, and says whether. Does not wait for anybody.

        Raises BadInput and OutsideFailure where the file cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            return False  # somebody who has just finished removed the directory in between
        except OSError as error:
            raise disk_error(error, f"cannot write to {self._path.parent}") from None
        self._note = self._note.model_copy(update={"machine": f"{_kernel()} {os.fstat(descriptor).st_dev}"})
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:
            locked = False  # no locks here
        if not self._is_file_of(descriptor) or self._is_held(os.pread(descriptor, 1 << 16, 0), locked):
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        self._write()
        if not locked:
            time.sleep(SETTLING_SECONDS)
            if not self._is_mine():
                self._close()
                return False
        self._beats = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._beats.start()
        return True

    def _is_held(self, content: bytes, locked: bool) -> bool:
        """Whether somebody is at work by what the file says; its lock is free, or there are no locks."""
        try:
            note = Note.model_validate_json(content)
        except ValidationError:
            note = None
        if not content or (note is not None and note.failure is not None):
            return False
        if note is not None and locked and note.machine == self._note.machine:
            return False  # its lock would not be free if it lived
        if self._watched[0] != content:
            self._watched = (content, time.monotonic())
        return time.monotonic() - self._watched[1] < self._stale

    def _is_file_of(self, descriptor: int) -> bool:
        """Whether the path still leads to the open file: the last holder may have removed it."""
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except OSError:
            return False

    def _is_mine(self) -> bool:
        note = self.read()
        return note is not None and note.id == self._note.id

    def _write(self) -> None:
        content = self._note.model_dump_json().encode()
        os.pwrite(self._descriptor, content, 0)
        os.ftruncate(self._descriptor, len(content))
        with suppress(OSError):
            os.fsync(self._descriptor)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            # a file that is gone went with the work directory, when the work was done
            if (note := self.read()) is not None and note.id != self._note.id:
                self._on_lost()
                return
            self._note = self._note.model_copy(update={"beat": self._note.beat + 1})
            with suppress(OSError):
                self._write()

    def release(self, *, failure: str | None = None, final: bool = False) -> None:
        """Lets go of the claim. failure: left in the file for those that wait."""
        self._ended.set()
        if self._beats is not None:
            self._beats.join()
        if self._descriptor < 0:
            return
        if failure is not None:
            self._note = self._note.model_copy(update={"failure": failure, "failure_is_final": final})
            with suppress(OSError):
                self._write()
        elif self._is_file_of(self._descriptor):
            self._path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty, or not there
                self._path.parent.rmdir()
        self._close()

    def _close(self) -> None:
        with suppress(OSError):  # a process that was forked meanwhile may have the file open as well
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)
        self._descriptor = -1
