"""Manifests: every file with its size and CRC32C, and the digest that stands for a whole checkpoint."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import google_crc32c
from pydantic import BaseModel, ConfigDict

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.files import in_parallel
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.record import COMMIT_NAME, checkpoint_root

BLOCK = 1 << 20
THREADS = 4


class FileEntry(BaseModel):
    """One file: its path relative to the root, with `/`; bytes; CRC32C in base64, as Cloud Storage prints it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int
    crc32c: str


def build_manifest(
    root: Path, *, threads: int = THREADS, reporter: Reporter = SILENT, task: str = "reading"
) -> list[FileEntry]:
    """Entries of every file under `root`, sorted by path.

    Reads each file once, in blocks: memory is `threads` megabytes. Raises BadInput for links to directories
    (they would be left out or read in circles), OutsideFailure where a file cannot be read.
    """
    sizes = list_files(root)
    with reporter.task(task, sum(sizes.values())) as progress:

        def read(path: str, stopped: threading.Event) -> FileEntry:
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

    Raises BadInput where there is none, or none that is committed.
    """
    step = checkpoint_root(checkpoint) / "0"
    if not (step / COMMIT_NAME).is_file():
        state = "is not committed" if step.is_dir() else "does not exist"
        raise BadInput(f"{step} {state} (no {COMMIT_NAME}): finish `ferry convert` first")
    return build_manifest(step, threads=threads, reporter=reporter, task=task)


def checkpoint_digest(path: Path, *, reporter: Reporter = SILENT) -> str:
    """`sha256:<hex>` over path, size and CRC32C of every file of the checkpoint at DST, DST/0 or DST/0/items.

    What a verdict and a published copy are bound to. Raises BadInput for a missing or uncommitted checkpoint.
    """
    return digest_of(checkpoint_manifest(path, reporter=reporter))


def digest_of(entries: Iterable[FileEntry]) -> str:
    """The digest of a checkpoint with these files, in whatever order they come."""
    lines = sorted((entry.path, entry.size, entry.crc32c) for entry in entries)
    return "sha256:" + hashlib.sha256(json.dumps(lines).encode()).hexdigest()


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
