"""Manifests: every file with its size and CRC32C, and the digest that stands for a whole checkpoint."""

from __future__ import annotations

import base64
import hashlib
import json
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
from conversion_lib.record import COMMIT_NAME, REPORT_DIR_NAME, checkpoint_root
from conversion_lib.storage.files import in_parallel, write_atomically

BLOCK = 1 << 20
THREADS = 4
SUMS_NAME = "sums.json"
"""In a checkpoint's report directory: the CRC32C of its files, so that check and publish read them once, not each."""
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


def build_manifest(
    root: Path,
    *,
    known: Mapping[str, str] | None = None,
    threads: int = THREADS,
    reporter: Reporter = SILENT,
    task: str = "reading",
) -> list[FileEntry]:
    """Entries of every file under `root`, sorted by path.

    known: CRC32C by path, of files that need not be read. The others are read once, in blocks: memory is `threads`
    megabytes. Raises BadInput for links to directories (they would be left out or read in circles), OutsideFailure
    where a file cannot be read.
    """
    sizes, known = list_files(root), known or {}
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

        return in_parallel(read, sizes, threads=threads)


def list_files(root: Path) -> dict[str, int]:
    """Paths relative to `root`, sorted, with sizes in bytes."""
    sizes = {}
    for path in root.rglob("*"):
        if path.is_symlink() and path.is_dir():
            raise BadInput(f"{path} is a link to a directory: put the directory itself there")
        if path.is_file():
            sizes[path.relative_to(root).as_posix()] = path.stat().st_size
    return dict(sorted(sizes.items()))


def checkpoint_manifest(
    checkpoint: Path, *, threads: int = THREADS, reporter: Reporter = SILENT, task: str = "reading"
) -> list[FileEntry]:
    """Entries of every file of the committed checkpoint at DST, DST/0 or DST/0/items, relative to DST/0.

    A file that has not changed since it was last read for this is not read again. Raises BadInput where there is
    none, or none that is committed.
    """
    root = checkpoint_root(checkpoint)
    step = root / "0"
    if not (step / COMMIT_NAME).is_file():
        state = "is not committed" if step.is_dir() else "does not exist"
        raise BadInput(f"{step} {state} (no {COMMIT_NAME}): finish `ferry convert` first")
    sums, began = root / REPORT_DIR_NAME / SUMS_NAME, time.time_ns()
    stats = {path: (step / path).stat() for path in list_files(step)}
    known = _known(sums, stats)
    entries = build_manifest(step, known=known, threads=threads, reporter=reporter, task=task)
    if any(entry.path not in known for entry in entries):
        _remember(sums, entries, stats, began)
    return entries


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


def digest_of(entries: Iterable[FileEntry]) -> str:
    """The digest of a checkpoint with these files, in whatever order they come."""
    lines = sorted((entry.path, entry.size, entry.crc32c) for entry in entries)
    return "sha256:" + hashlib.sha256(json.dumps(lines).encode()).hexdigest()


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
    """Copies in blocks; whether size and CRC32C of what went through are those of `entry`."""
    size, checksum = 0, google_crc32c.Checksum()
    while (block := source.read(BLOCK)) and not stopped.is_set():
        target.write(block)
        checksum.update(block)
        size += len(block)
        advance(len(block))
    return (size, encode_crc32c(checksum)) == (entry.size, entry.crc32c)
