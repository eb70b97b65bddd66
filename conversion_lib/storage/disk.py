"""Free and used space on a disk."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from conversion_lib.errors import BadInput
from conversion_lib.progress import format_bytes
from conversion_lib.storage.files import existing_parent


def bytes_below(directory: Path) -> int:
    """Returns the bytes that all files below a directory take on disk."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):  # other parts are at work there
                total += Path(parent, name).lstat().st_blocks * 512
    return total


def free_bytes(path: Path) -> int:
    """Returns the free bytes on the file system of `path`, which need not exist."""
    return shutil.disk_usage(existing_parent(path.absolute())).free


def same_disk(a: Path, b: Path) -> bool:
    """Returns whether two paths, which need not exist, are on the same file system."""
    return len({existing_parent(path.absolute()).stat().st_dev for path in (a, b)}) == 1


def check_disk(destination: Path, needed: int, otherwise: str = "") -> None:
    """Checks that a disk has enough space.

    Args:
        destination: A path on the disk. It need not exist.
        needed: Bytes.
        otherwise: Added to the advice in the error message.

    Raises:
        BadInput: Fewer bytes are free.
    """
    free = free_bytes(destination)
    if free < needed:
        raise BadInput(
            f"{destination}: the disk has {format_bytes(free)} free and {format_bytes(needed)} are needed; "
            f"free some space, or choose another destination{otherwise}"
        )
