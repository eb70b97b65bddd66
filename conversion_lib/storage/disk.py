"""How much room there is on a disk, and how much is taken."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from conversion_lib.errors import BadInput
from conversion_lib.progress import format_bytes
from conversion_lib.storage.files import existing_parent


def bytes_below(directory: Path) -> int:
    """Bytes that the files below take on disk."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):  # other parts are at work there
                total += Path(parent, name).lstat().st_blocks * 512
    return total


def free_bytes(path: Path) -> int:
    """Bytes free on the file system that `path` lies on, or would: it need not be there."""
    return shutil.disk_usage(existing_parent(path.absolute())).free


def same_disk(a: Path, b: Path) -> bool:
    """Whether two paths lie on one file system, or would."""
    return len({existing_parent(path.absolute()).stat().st_dev for path in (a, b)}) == 1


def check_disk(destination: Path, needed: int, otherwise: str = "") -> None:
    """Raises BadInput where the file system of `destination` has fewer than `needed` bytes free.

    otherwise: what can be done beside making room or choosing another destination.
    """
    free = free_bytes(destination)
    if free < needed:
        raise BadInput(
            f"{destination}: the disk has {format_bytes(free)} free and {format_bytes(needed)} are needed; "
            f"free some, or choose another destination{otherwise}"
        )
