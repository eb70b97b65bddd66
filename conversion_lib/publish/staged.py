"""A converted checkpoint that is to be published, in a directory or in Cloud Storage, and its digest."""

from __future__ import annotations

from pathlib import Path

from conversion_lib.errors import BadInput
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.publish.destinations.base import Item
from conversion_lib.publish.manifest import digest_of
from conversion_lib.record import COMMIT_NAME, REPORT_DIR_NAME, STEP_NAME
from conversion_lib.sources.orbax import root_of
from conversion_lib.storage.checksums import FileEntry
from conversion_lib.storage.interface import Location

SUMS_NAME = "sums.json"
"""In a checkpoint's report directory: the CRC32Cs of its files, so that check and publish need not both read them."""


class Staged:
    """A converted checkpoint. `root` is DST of `ferry convert`. Paths are relative to it, with `/`."""

    def __init__(self, root: Location) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def read(self, path: str) -> bytes | None:
        """Reads a small file; None if there is none."""
        return (self.root / path).read()

    def step(self, reporter: Reporter) -> list[FileEntry]:
        """Returns entries of the committed checkpoint, relative to `0/`.

        A file that has not changed since the last call is not read again.

        Raises:
            BadInput: The checkpoint is missing or not committed.
            OutsideFailure: A file cannot be read, or Cloud Storage failed.
        """
        step = self.root / STEP_NAME
        if (step / COMMIT_NAME).read() is None:
            state = "is not committed" if step.children() else "does not exist"
            raise BadInput(f"{step} {state} (no {COMMIT_NAME}): finish `ferry convert` first")
        sums = self.root / REPORT_DIR_NAME / SUMS_NAME
        return step.entries(sums=sums, reporter=reporter, task=f"reading {self.root}")

    def folder(self, name: str) -> list[FileEntry]:
        """Returns entries of every file in a folder, relative to it; none if there is no such folder."""
        return (self.root / name).entries()

    def item(self, folder: str, entry: FileEntry) -> Item:
        """Returns a file of `folder` as an item to publish at the same relative path."""
        placed = entry.model_copy(update={"path": f"{folder}/{entry.path}", "generation": None})
        return Item(placed, (self.root / folder).stored(entry))


def open_staged(checkpoint: str | Path) -> Staged:
    """Opens the checkpoint at DST, DST/0 or DST/0/items, a path or gs://bucket/prefix.

    Raises:
        BadInput: It is another URL.
    """
    return Staged(root_of(checkpoint))


def checkpoint_digest(checkpoint: str | Path, *, reporter: Reporter = SILENT) -> str:
    """Returns the digest that binds a verdict or a published copy to a checkpoint.

    Args:
        checkpoint: DST, DST/0 or DST/0/items: a path or gs://bucket/prefix.
        reporter: Shows the progress of reading. In a bucket nothing is read: the service has the CRC32Cs.

    Returns:
        `sha256:<hex>` over path, size and CRC32C of every file.

    Raises:
        BadInput: The checkpoint is missing or not committed.
        OutsideFailure: A file cannot be read, or Cloud Storage failed.
    """
    return digest_of(open_staged(checkpoint).step(reporter))
