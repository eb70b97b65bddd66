"""Append-only logs: lines are appended durably, and a later run replays them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from conversion_lib.core.documents import read_limited

RESERVE_BYTES = 64 << 10
"""Disk space reserved for the log, so that finished work can still be logged when the disk is full."""


class Log(Protocol):
    """Lines, each ending with a newline."""

    def replay(self, take: Callable[[bytes], bool]) -> None:
        """Passes every line to `take`, which returns False for a line that is damaged or was cut short by a kill."""
        ...

    def open(self) -> None:
        """Opens the log for `append`. Call `replay` before."""
        ...

    def append(self, line: bytes) -> None:
        """Appends a line durably: all of it or nothing."""
        ...

    def exists(self) -> bool:
        """Whether anything was logged."""
        ...

    def remove(self) -> None:
        """Removes the log."""
        ...

    def close(self) -> None:
        """Closes the log."""
        ...


class FileLog:
    """The log in the file `path`. `open` cuts off a line that `replay` found damaged, with all lines after it."""

    def __init__(self, path: Path) -> None:
        self.path, self._reserve = path, path.with_suffix(".reserve")
        self._end = 0
        self._descriptor = -1

    def replay(self, take: Callable[[bytes], bool]) -> None:
        self._end = 0
        for line in read_limited(self.path).splitlines(keepends=True) if self.path.exists() else []:
            if not take(line):
                break
            self._end += len(line)

    def append(self, line: bytes) -> None:
        try:
            self._write(line)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._reserve.exists():
                raise
            self._reserve.unlink()
            self._write(line)

    def open(self) -> None:
        """Opens the log, and reserves disk space."""
        if self.path.exists() and self._end < self.path.stat().st_size:
            os.truncate(self.path, self._end)
        if not self._reserve.exists():
            self._reserve.write_bytes(os.urandom(RESERVE_BYTES))  # not zeros: some file systems would not store them
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def _write(self, line: bytes) -> None:
        end = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, end)
            raise

    def exists(self) -> bool:
        return self.path.exists()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
