"""Files by size and CRC32C, the checksum that Cloud Storage keeps of every object."""

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

BLOCK = 1 << 20
THREADS = 4
YOUNG_NS = 2 * 10**9
"""A file changed so short a time before it was read may change again without its times showing it."""


class FileEntry(BaseModel):
    """One file: its path relative to the root, with `/`; bytes; CRC32C in base64, as Cloud Storage prints it.

    generation: the number of this version of the object, where it lies in Cloud Storage.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int
    crc32c: str
    generation: int | None = None


class Sum(BaseModel):
    """The CRC32C of a file that had these times (nanoseconds since 1970) and bytes when it was read."""

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
    """Entries of every file under `root`, sorted by path.

    sums: a file that keeps the CRC32C of what was read; what has not changed since is not read again. The others are
    read once, in blocks: memory is `threads` megabytes. Raises BadInput for links to directories (they would be left
    out or read in circles), OutsideFailure where a file cannot be read.
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
    """Paths relative to `root`, sorted, with sizes in bytes."""
    sizes = {}
    for path in root.rglob("*"):
        if path.is_symlink() and path.is_dir():
            raise BadInput(f"{path} is a link to a directory: put the directory itself there")
        if path.is_file():
            sizes[path.relative_to(root).as_posix()] = path.stat().st_size
    return dict(sorted(sizes.items()))


def _known(sums: Path, stats: Mapping[str, os.stat_result]) -> dict[str, str]:
    """The CRC32C of the files that are as they were when they were read."""
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
    """Keeps the CRC32C of what was read, where the directory may be written. began: nanoseconds since 1970."""
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
    """The CRC32C of a file's bytes as they are now."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            checksum.update(block)
    return encode_crc32c(checksum)


def crc32c_of(content: bytes) -> str:
    return encode_crc32c(google_crc32c.Checksum(content))


def encode_crc32c(checksum: google_crc32c.Checksum) -> str:
    """Base64 of the four bytes, most significant first."""
    return base64.b64encode(checksum.digest()).decode()


def copy_checked(
    source: IO[bytes], target: IO[bytes], entry: FileEntry, advance: Callable[[int], None], stopped: threading.Event
) -> bool:
    """Copies in blocks; whether size and CRC32C of what went through are those of `entry`.

    It asks for one byte past the end together with the last block: a file that has grown is found out, and an object of
    a bucket takes no request of its own to learn that there is no more.
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
