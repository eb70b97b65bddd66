"""The bytes of objects, in memory or in files, and uploads as they grow."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c

BLOCK = 256 << 10
"""What a resumable upload is kept in: an interrupted request leaves whole blocks."""


@dataclass
class Content:
    """The bytes of one object; those in a file are read as they are asked for."""

    source: bytes | bytearray | Path
    size: int
    crc32c: str

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` to `stop`, in pieces."""
        if isinstance(self.source, Path):
            with self.source.open("rb") as stream:
                stream.seek(start)
                while start < stop and (block := stream.read(min(4 * BLOCK, stop - start))):
                    start += len(block)
                    yield block
        elif start < stop:
            yield bytes(memoryview(self.source)[start:stop])

    def all(self) -> bytes:
        return b"".join(self.read(0, self.size))

    @property
    def md5(self) -> str:
        digest = hashlib.md5(usedforsecurity=False)
        for block in self.read(0, self.size):
            digest.update(block)
        return base64.b64encode(digest.digest()).decode()


def make_content(content: bytes) -> Content:
    return Content(content, len(content), encode(google_crc32c.Checksum(content)))


def encode(checksum: google_crc32c.Checksum) -> str:
    return base64.b64encode(checksum.digest()).decode()


_numbers = itertools.count()


@dataclass
class Growing:
    """Bytes that are being uploaded; kept in a file where there is a `directory`."""

    directory: Path | None
    kept: int = 0
    """Bytes that an interruption leaves, in whole blocks."""
    _memory: bytearray = field(default_factory=bytearray)
    _path: Path | None = None
    _tail: bytes = b""
    _checksum: google_crc32c.Checksum = field(default_factory=google_crc32c.Checksum)

    @property
    def received(self) -> int:
        return self.kept + len(self._tail)

    def write(self, block: bytes) -> None:
        block = self._tail + block if self._tail else block
        whole = len(block) - len(block) % BLOCK
        self._keep(block[:whole])
        self._tail = block[whole:]

    def interrupt(self) -> None:
        """Forgets what is no whole block."""
        self._tail = b""

    def finish(self) -> Content:
        self._keep(self._tail)
        self._tail = b""
        return Content(self._path or self._memory, self.kept, encode(self._checksum))

    def _keep(self, block: bytes) -> None:
        if not block:
            return
        self._checksum.update(block)
        self.kept += len(block)
        if self.directory is None:
            self._memory += block
            return
        self._path = self._path or self.directory / f"object-{next(_numbers)}"
        with self._path.open("ab") as stream:
            stream.write(block)
