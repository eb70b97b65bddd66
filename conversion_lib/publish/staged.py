"""A converted checkpoint as it is published, and its digest: in a directory, or converted straight to Cloud Storage."""

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
"""In a checkpoint's report directory: the CRC32C of its files, so that check and publish read them once, not each."""


class Staged:
    """A converted checkpoint, `root` being DST of `ferry convert`. Paths are relative to it, with `/`."""

    def __init__(self, root: Location) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def read(self, path: str) -> bytes | None:
        """A small file; None where there is none."""
        return (self.root / path).read()

    def step(self, reporter: Reporter) -> list[FileEntry]:
        """Entries of the committed checkpoint, relative to `0/`. Raises BadInput where there is none.

        A file that has not changed since it was last read for this is not read again.
        """
        step = self.root / STEP_NAME
        if (step / COMMIT_NAME).read() is None:
            state = "is not committed" if step.children() else "does not exist"
            raise BadInput(f"{step} {state} (no {COMMIT_NAME}): finish `ferry convert` first")
        sums = self.root / REPORT_DIR_NAME / SUMS_NAME
        return step.entries(sums=sums, reporter=reporter, task=f"reading {self.root}")

    def folder(self, name: str) -> list[FileEntry]:
        """Entries of every file in a folder, relative to it; none where there is no such folder."""
        return (self.root / name).entries()

    def item(self, folder: str, entry: FileEntry) -> Item:
        """The file with this entry of `folder`, to be published at the same place."""
        placed = entry.model_copy(update={"path": f"{folder}/{entry.path}", "generation": None})
        return Item(placed, (self.root / folder).stored(entry))


def open_staged(checkpoint: str | Path) -> Staged:
    """The checkpoint at DST, DST/0 or DST/0/items, a path or gs://bucket/prefix."""
    return Staged(root_of(checkpoint))


def checkpoint_digest(checkpoint: str | Path, *, reporter: Reporter = SILENT) -> str:
    """`sha256:<hex>` over path, size and CRC32C of every file of the checkpoint at DST, DST/0 or DST/0/items.

    What a verdict and a published copy are bound to. In a bucket the service's own CRC32C are taken. Raises BadInput
    for a missing or uncommitted checkpoint.
    """
    return digest_of(open_staged(checkpoint).step(reporter))
