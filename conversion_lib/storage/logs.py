"""A log that only grows: lines appended durably, and replayed by whoever comes next."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

RESERVE_BYTES = 64 << 10
"""Kept aside for the log, so that on a disk that runs full what was written before can still be noted."""


class Log(Protocol):
    """Lines, each ending with a newline."""

    def replay(self, take: Callable[[bytes], bool]) -> None:
        """Hands over every line. One that `take` refuses is damaged, or was cut short by a kill."""
        ...

    def open(self) -> None:
        """Makes ready to append, after `replay`."""
        ...

    def append(self, line: bytes) -> None:
        """Adds a line, durably: all of it or nothing."""
        ...

    def exists(self) -> bool: ...

    def remove(self) -> None: ...

    def close(self) -> None: ...


class FileLog:
    """The log in the file `path`. A line that `replay` finds damaged is cut off, with all that follow, at `open`."""

    def __init__(self, path: Path) -> None:
        self.path, self._reserve = path, path.with_suffix(".reserve")
        self._end = 0
        self._descriptor = -1

    def replay(self, take: Callable[[bytes], bool]) -> None:
        self._end = 0
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []:
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
        """Also sets the reserve aside."""
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
