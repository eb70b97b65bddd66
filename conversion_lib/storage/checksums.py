"""Sizes and CRC32Cs of files. CRC32C is the checksum that Cloud Storage keeps for every object."""

from __future__ import annotations

import base64
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import google_crc32c
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.storage.files import in_parallel, write_atomically
from conversion_lib.storage.links import refuse_links_out

BLOCK = 1 << 20
THREADS = 4
YOUNG_NS = 2 * 10**9
"""The sum of a file that changed less than this before it was read is not kept: the file may change again without a
new timestamp."""


class FileEntry(BaseModel):
    """One file of a tree.

    Attributes:
        path: Relative to the root, with `/`.
        size: Bytes.
        crc32c: In base64, as Cloud Storage prints it.
        generation: The object's version number in Cloud Storage. None: elsewhere.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int
    crc32c: str
    generation: int | None = None


class Sum(BaseModel):
    """The CRC32C of a file that had these timestamps (nanoseconds since 1970) and bytes when it was read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    mtime_ns: int
    ctime_ns: int
    crc32c: str


_SUMS = TypeAdapter(dict[str, Sum])


def entries_below(
    root: Path,
    *,
    sums: Path | None = None,
    threads: int = THREADS,
    reporter: Reporter = SILENT,
    task: str = "reading",
) -> list[FileEntry]:
    """Returns entries of every file under `root`, sorted by path.

    Each file is read once, in blocks: this takes `threads` MiB of memory.

    Args:
        root: A directory.
        sums: A file that keeps CRC32Cs between calls, so that unchanged files are not read again. None: all are read.
        threads: How many files are read at once.
        reporter: Shows the progress.
        task: The name of the progress.

    Raises:
        BadInput: As for `list_files`.
        OutsideFailure: A file cannot be read.
    """
    sizes, began = list_files(root), time.time_ns()
    stats = {path: (root / path).stat() for path in sizes} if sums else {}
    known = _known(sums, stats) if sums else {}
    with reporter.task(task, sum(size for path, size in sizes.items() if path not in known)) as progress:

        def read(path: str, stopped: threading.Event) -> FileEntry:
            if path in known:
                return FileEntry(path=path, size=sizes[path], crc32c=known[path])
            size, checksum = 0, google_crc32c.Checksum()
            try:
                with (root / path).open("rb") as stream:
                    while (block := stream.read(BLOCK)) and not stopped.is_set():
                        checksum.update(block)
                        size += len(block)
                        progress.advance(len(block))
            except OSError as error:
                raise OutsideFailure(f"cannot read {root / path}: {error.strerror}") from error
            return FileEntry(path=path, size=size, crc32c=encode_crc32c(checksum))

        entries = in_parallel(read, sizes, threads=threads)
    if sums and entries and len(known) < len(entries):
        _remember(sums, entries, stats, began)
    return entries


def list_files(root: Path) -> dict[str, int]:
    """Returns the sizes in bytes of all files under `root`, by relative path, sorted.

    Raises:
        BadInput: A link leads out of `root`, or leads to a directory, which would be skipped or read in circles.
    """
    refuse_links_out(root)
    sizes = {}
    for path in root.rglob("*"):
        if path.is_symlink() and path.is_dir():
            raise BadInput(f"{path} is a link to a directory: replace it with the directory itself")
        if path.is_file():
            sizes[path.relative_to(root).as_posix()] = path.stat().st_size
    return dict(sorted(sizes.items()))


def _known(sums: Path, stats: Mapping[str, os.stat_result]) -> dict[str, str]:
    """Returns the kept CRC32Cs of files that have not changed since they were read."""
    try:
        earlier = _SUMS.validate_json(sums.read_bytes())
    except (OSError, ValidationError):
        return {}
    return {
        path: old.crc32c
        for path, stat in stats.items()
        if (old := earlier.get(path)) is not None
        and (old.size, old.mtime_ns, old.ctime_ns) == (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    }


def _remember(sums: Path, entries: Iterable[FileEntry], stats: Mapping[str, os.stat_result], began: int) -> None:
    """Keeps the CRC32Cs that were read, if the directory is writable. began: nanoseconds since 1970."""
    content = {}
    for entry in entries:
        stat = stats.get(entry.path)
        if stat is not None and stat.st_size == entry.size and stat.st_ctime_ns < began - YOUNG_NS:
            content[entry.path] = Sum(
                size=entry.size, mtime_ns=stat.st_mtime_ns, ctime_ns=stat.st_ctime_ns, crc32c=entry.crc32c
            )
    with suppress(OSError):
        if content:
            sums.parent.mkdir(exist_ok=True)
            write_atomically(sums, _SUMS.dump_json(content))


def file_crc32c(path: Path) -> str:
    """Reads a file and returns its CRC32C in base64."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            checksum.update(block)
    return encode_crc32c(checksum)


def crc32c_of(content: bytes) -> str:
    """Returns the CRC32C in base64."""
    return encode_crc32c(google_crc32c.Checksum(content))


def encode_crc32c(checksum: google_crc32c.Checksum) -> str:
    """Returns the base64 of the four bytes, most significant first, as Cloud Storage prints it."""
    return base64.b64encode(checksum.digest()).decode()


def copy_checked(
    source: IO[bytes], target: IO[bytes], entry: FileEntry, advance: Callable[[int], None], stopped: threading.Event
) -> bool:
    """Copies a file in blocks.

    The last read asks for one byte more than is left. A file that has grown is noticed, and an object in a bucket needs
    no further request to learn that it has ended.

    Args:
        source: Read to its end.
        target: Written to, but not synced.
        entry: The expected size and CRC32C.
        advance: Called with the bytes of each block.
        stopped: Ends the copy early.

    Returns:
        Whether the copied bytes have the expected size and CRC32C.
    """
    size, checksum = 0, google_crc32c.Checksum()
    while not stopped.is_set() and (block := source.read(min(BLOCK, entry.size + 1 - size))):
        target.write(block)
        checksum.update(block)
        size += len(block)
        advance(len(block))
        if size >= entry.size:
            break
    return (size, encode_crc32c(checksum)) == (entry.size, entry.crc32c)
