"""A converted checkpoint that is to be published, in a directory or in Cloud Storage, and its digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

from conversion_lib.errors import BadInput
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.publish.destinations.base import Item
from conversion_lib.publish.manifest import digest_of
from conversion_lib.record import (
    COMMIT_NAME,
    HF_DIR_NAME,
    MAXTEXT_MODELS_NAME,
    MAXTEXT_SETTINGS_NAME,
    RECORD_NAME,
    REPORT_DIR_NAME,
    STEP_NAME,
)
from conversion_lib.sources.orbax import root_of
from conversion_lib.storage.checksums import FileEntry
from conversion_lib.storage.interface import Location
from conversion_lib.storage.links import refuse_links_out
from conversion_lib.storage.names import require_distinct, safe_path

SUMS_NAME = "sums.json"
"""In a checkpoint's report directory: the CRC32Cs of its files, so that check and publish need not both read them."""


COMPANIONS = (RECORD_NAME, MAXTEXT_SETTINGS_NAME)
FOLDERS = (HF_DIR_NAME, MAXTEXT_MODELS_NAME)
"""Files and folders in DST that are published with a checkpoint, whole or in part."""


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
        self._refuse_links()
        step = self.root / STEP_NAME
        if (step / COMMIT_NAME).read() is None:
            state = "is not committed" if step.children() else "does not exist"
            raise BadInput(f"{step} {state} (no {COMMIT_NAME}): finish `ferry convert` first")
        sums = self.root / REPORT_DIR_NAME / SUMS_NAME
        return _checked(step.entries(sums=sums, reporter=reporter, task=f"reading {self.root}"), step)

    def companions(self) -> dict[str, str]:
        """Returns the SHA-256 of each small file that is published with the checkpoint, whole or in part, by its path.

        The report is not among them: it may be somewhere else.
        """
        paths = [f"{folder}/{entry.path}" for folder in FOLDERS for entry in self.folder(folder)]
        contents = ((path, self.read(path)) for path in (*paths, *COMPANIONS))
        return {path: sha256_of(content) for path, content in contents if content is not None}

    def folder(self, name: str) -> list[FileEntry]:
        """Returns entries of every file in a folder, relative to it; none if there is no such folder."""
        self._refuse_links()
        return _checked((self.root / name).entries(), self.root / name)

    def _refuse_links(self) -> None:
        """Raises BadInput if a link leads out of the checkpoint."""
        if self.root.local is not None:
            for name in (STEP_NAME, *FOLDERS, REPORT_DIR_NAME):
                refuse_links_out(self.root.local / name, within=self.root.local)

    def item(self, folder: str, entry: FileEntry) -> Item:
        """Returns a file of `folder` as an item to publish at the same relative path."""
        placed = entry.model_copy(update={"path": f"{folder}/{entry.path}", "generation": None})
        return Item(placed, (self.root / folder).stored(entry))


def _checked(entries: list[FileEntry], where: Location) -> list[FileEntry]:
    """Returns the entries. Raises BadInput if one could not be a file of its own below a directory."""
    require_distinct((safe_path(entry.path, where) for entry in entries), where)
    return entries


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
