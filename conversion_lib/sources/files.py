"""The files of a Hugging Face checkpoint, wherever they lie: in a directory, in a bucket, or on the Hub.

Of a shard, what lies before its tensors is data that a source is made from; the tensors are read where they lie.
"""

from __future__ import annotations

import os
import struct
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from conversion_lib.core.tensors import Source
from conversion_lib.models.hf_config import ModelConfig, load_config
from conversion_lib.plan.pace import Pace

MAX_HEADER = 100 << 20  # the format's own limit
FIRST_BYTES = 128 << 10
"""Asked of each weight file at once: more than nearly every header has, so that one request is enough."""
OPEN_FILES = 64

ReadRun = Callable[[int, memoryview], None]
"""Fills a view with the bytes of one file from an offset on. Raises EOFError where the file ends before."""


class Shard(NamedTuple):
    """A weight file, as far as it is known without its tensors.

    modified: when it was written last, in nanoseconds; a file that was written anew counts as changed.
    content: a hash of it, where the place itself gives one; else empty.
    """

    name: str
    size: int
    modified: int
    content: str = ""


class Files(ABC):
    """A checkpoint's files. Sources of it may be opened several times.

    name: what messages call the checkpoint: its directory, its URL, its repository and commit.
    directory: where its small files lie, such as config.json, the index and the tokenizer's.
    """

    name: str
    directory: Path

    @abstractmethod
    def has(self, shard: str) -> bool:
        """Whether there is a weight file of this name."""

    @abstractmethod
    def header(self, shard: str) -> tuple[Shard, bytes]:
        """What is known of a weight file, and its first bytes: length and header, fewer where they cannot be right."""

    @abstractmethod
    def reader(self, shard: str) -> ReadRun:
        """How the bytes of a weight file are read."""

    @abstractmethod
    def modified(self, name: str) -> int:
        """When a small file was written last, as for a shard; 0 where there is none."""

    def config(self) -> ModelConfig:
        """Its config.json. Raises BadInput as `load_config` does."""
        return load_config(self.directory, self.name)

    def pace(self, stored: Source, shown: Source) -> Pace | None:
        """What is to be told of the pieces made from `stored`, which the plan reads as `shown`; None: nothing."""
        return None


def header_bytes(size: int, first_bytes: Callable[[int], bytes]) -> bytes:
    """The length and the header of a safetensors file of `size` bytes.

    first_bytes: gives so many bytes of the file from its beginning. Of a file whose header cannot be right, whatever
    came of it: SafetensorsSource refuses it.
    """
    start = first_bytes(min(FIRST_BYTES, size)) if size >= 8 else b""
    if len(start) < 8:
        return start
    length: int = 8 + struct.unpack("<Q", start[:8])[0]
    if len(start) < length <= min(8 + MAX_HEADER, size):
        start = first_bytes(length)
    return start[:length]


class LocalFiles(Files):
    """A directory on a file system of this machine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.name = str(self.directory)
        self._handles = Handles()

    def has(self, shard: str) -> bool:
        return (self.directory / shard).is_file()

    def header(self, shard: str) -> tuple[Shard, bytes]:
        with (self.directory / shard).open("rb") as file:
            stat = os.fstat(file.fileno())

            def first_bytes(count: int) -> bytes:
                file.seek(0)
                return file.read(count)

            start = header_bytes(stat.st_size, first_bytes)
        return Shard(shard, stat.st_size, stat.st_mtime_ns), start

    def reader(self, shard: str) -> ReadRun:
        return self._handles.reader(self.directory / shard)

    def modified(self, name: str) -> int:
        path = self.directory / name
        return path.stat().st_mtime_ns if path.exists() else 0


class Handles:
    """Open files, the least recently used closed beyond OPEN_FILES. A file in use stays open until let go."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, file: Path) -> Any:
        with self._lock:
            handle = self._open.pop(file, None) or file.open("rb", buffering=0)
            self._open[file] = handle
            # a handle that falls out is closed when the last reader that holds it is done
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
            return handle

    def reader(self, file: Path) -> ReadRun:
        """Reads `file` with positional reads; it stays open for as long as what is returned is kept."""
        handle = self.get(file)

        def read(offset: int, view: memoryview) -> None:
            done = 0
            while done < len(view):
                got = os.preadv(handle.fileno(), [view[done:]], offset + done)
                if got == 0:
                    raise EOFError(f"the file ends at byte {offset + done}, expected {offset + len(view)}")
                done += got

        return read

    def forget(self, file: Path) -> None:
        """Lets go of `file`: what has its name from now on may be another."""
        with self._lock:
            self._open.pop(file, None)
