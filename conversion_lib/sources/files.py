"""The files of a Hugging Face checkpoint in a directory, in a bucket, or on the Hub.

A source is made from the bytes of each shard before its tensors. The tensors are read in place.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from conversion_lib.core.tensors import Source
from conversion_lib.models.hf_config import ModelConfig, load_config
from conversion_lib.plan.pace import Pace
from conversion_lib.record import Origin
from conversion_lib.sources.noted import Noted
from conversion_lib.sources.safetensors_header import header_bytes
from conversion_lib.sources.weight_files import SUFFIX
from conversion_lib.storage.links import refuse_links_out
from conversion_lib.storage.names import path_below

OPEN_FILES = 64

ReadRun = Callable[[int, memoryview], None]
"""Fills a view with the bytes of one file that start at an offset. Raises EOFError if the file ends too early."""


class Shard(NamedTuple):
    """What is known about a weight file without its tensors.

    Attributes:
        name: The file's name in the checkpoint's directory.
        size: Bytes.
        modified: Time of the last write, in nanoseconds. A file that is written again counts as changed.
        content: A hash of the content if the storage gives one, such as the Hub; otherwise empty.
    """

    name: str
    size: int
    modified: int
    content: str = ""


class Files(ABC):
    """A checkpoint's files. Several sources may be opened from one instance.

    Attributes:
        name: The checkpoint's name in messages: its directory, its URL, or its repository and commit.
        directory: A local directory with the small files, such as config.json, the index and the tokenizer's files.
        readable: Whether tensors can be read, not only headers.
    """

    name: str
    directory: Path
    readable: bool = True

    @abstractmethod
    def weights(self) -> set[str]:
        """Returns the names of all safetensors files, also of those that are not read."""

    @abstractmethod
    def header(self, shard: str) -> tuple[Shard, bytes]:
        """Returns what is known about a weight file, and its length field and header.

        Returns:
            The shard, and the first bytes of the file. They are fewer if the file is truncated or its length field is
            not valid.
        """

    @abstractmethod
    def reader(self, shard: str) -> ReadRun:
        """Returns a function that reads the bytes of a weight file.

        It may be called from several threads. It raises EOFError, OSError or a project error.
        """

    def content(self, shard: Shard) -> str | None:
        """Returns what identifies a weight file's content without reading it; None if only its time does."""
        return shard.content or None

    def origin(self, shards: Collection[Shard]) -> Origin:
        """Returns where the weights in these files came from."""
        return Origin(path=self.name)

    def doubts(self, shards: Collection[Shard]) -> list[str]:
        """Returns what a person should know about their origin, one line each."""
        return []

    def config(self) -> ModelConfig:
        """Reads config.json.

        Raises:
            BadInput: As `load_config` raises it.
        """
        return load_config(self.directory, self.name)

    def pace(self, stored: Source, shown: Source) -> Pace | None:
        """Returns what sets the order of pieces and is told which ones are read.

        Args:
            stored: The source of the files themselves.
            shown: The source that the plan reads, such as `stored` dequantized.

        Returns:
            None if all files are at hand, so that any order will do.
        """
        return None


class LocalFiles(Files):
    """A checkpoint in a local directory. Raises BadInput if a link in the directory leads out of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.name = str(self.directory)
        refuse_links_out(self.directory, recursive=False)
        self._handles = Handles()

    def weights(self) -> set[str]:
        found = self.directory.glob(f"*{SUFFIX}")
        return {path.name for path in found if path.is_file() and not path.name.startswith(".")}

    def header(self, shard: str) -> tuple[Shard, bytes]:
        with path_below(self.directory, shard).open("rb") as file:
            stat = os.fstat(file.fileno())

            def first_bytes(count: int) -> bytes:
                file.seek(0)
                return file.read(count)

            start = header_bytes(stat.st_size, first_bytes)
        return Shard(shard, stat.st_size, stat.st_mtime_ns), start

    def reader(self, shard: str) -> ReadRun:
        return self._handles.reader(path_below(self.directory, shard))

    def content(self, shard: Shard) -> str | None:
        return self._noted.content(shard)

    def origin(self, shards: Collection[Shard]) -> Origin:
        return self._noted.origin(shards) or super().origin(shards)

    def doubts(self, shards: Collection[Shard]) -> list[str]:
        return self._noted.doubts(shards)

    @cached_property
    def _noted(self) -> Noted:
        return Noted(self.directory)


class Handles:
    """A cache of at most OPEN_FILES open files. The least recently used file is closed once no reader holds it."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, file: Path) -> Any:
        with self._lock:
            handle = self._open.pop(file, None) or file.open("rb", buffering=0)
            self._open[file] = handle
            # a handle that is dropped here is closed when its last reader drops it
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
            return handle

    def reader(self, file: Path) -> ReadRun:
        """Returns a function that reads `file` with positional reads. The file stays open while the function exists."""
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
        """Drops the handle of `file`, because another file may take its name from now on."""
        with self._lock:
            self._open.pop(file, None)
