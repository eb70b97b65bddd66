"""A converted checkpoint as it is published, and its digest: in a directory, or converted straight to Cloud Storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from conversion_lib.errors import BadInput
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.publish.destinations.base import Item
from conversion_lib.publish.manifest import FileEntry, build_manifest, checkpoint_manifest, digest_of
from conversion_lib.record import COMMIT_NAME, checkpoint_root
from conversion_lib.storage.gcs import SCHEME, BucketLocation, stored_at


class Staged(Protocol):
    """A converted checkpoint, DST of `ferry convert`. Paths are relative to it, with `/`."""

    url: str

    def read(self, path: str) -> bytes | None:
        """A small file; None where there is none."""
        ...

    def step(self, reporter: Reporter) -> list[FileEntry]:
        """Entries of the committed checkpoint, relative to `0/`. Raises BadInput where there is none."""
        ...

    def folder(self, name: str) -> list[FileEntry]:
        """Entries of every file in a folder, relative to it; none where there is no such folder."""
        ...

    def item(self, folder: str, entry: FileEntry) -> Item:
        """The file with this entry of `folder`, to be published at the same place."""
        ...


def open_staged(checkpoint: str | Path) -> Staged:
    """The checkpoint at DST, DST/0 or DST/0/items, a path or gs://bucket/prefix."""
    if isinstance(checkpoint, str) and checkpoint.startswith(SCHEME):
        return StagedPrefix(checkpoint)
    return StagedDirectory(Path(checkpoint))


def checkpoint_digest(path: Path, *, reporter: Reporter = SILENT) -> str:
    """`sha256:<hex>` over path, size and CRC32C of every file of the checkpoint at DST, DST/0 or DST/0/items.

    What a verdict and a published copy are bound to. In a bucket the service's own CRC32C are taken. Raises BadInput
    for a missing or uncommitted checkpoint.
    """
    place = stored_at(checkpoint_root(path))
    return digest_of(open_staged(str(place) if isinstance(place, BucketLocation) else path).step(reporter))


class StagedDirectory:
    def __init__(self, checkpoint: Path) -> None:
        self.root = checkpoint_root(checkpoint)
        self.url = str(self.root)

    def read(self, path: str) -> bytes | None:
        try:
            return (self.root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def step(self, reporter: Reporter) -> list[FileEntry]:
        return checkpoint_manifest(self.root, reporter=reporter, task=f"reading {self.root}")

    def folder(self, name: str) -> list[FileEntry]:
        return build_manifest(self.root / name) if (self.root / name).is_dir() else []

    def item(self, folder: str, entry: FileEntry) -> Item:
        return Item(_placed(folder, entry), self.root / folder / entry.path)


class StagedPrefix:
    """In Cloud Storage: what the service says of its objects is enough, and it copies them itself."""

    def __init__(self, url: str) -> None:
        whole = url.rstrip("/").removesuffix("/items")
        self._place = BucketLocation.parse(whole.removesuffix("/0"))
        self.url = str(self._place)
        self._blobs: dict[str, Any] = {}

    def read(self, path: str) -> bytes | None:
        return (self._place / path).read()

    def step(self, reporter: Reporter) -> list[FileEntry]:
        entries = self.folder("0")
        if not any(entry.path == COMMIT_NAME for entry in entries):
            state = "is not committed" if entries else "does not exist"
            raise BadInput(f"{self.url}/0 {state} (no {COMMIT_NAME}): finish `ferry convert` first")
        return entries

    def folder(self, name: str) -> list[FileEntry]:
        folder = self._place / name
        blobs = {blob.name[len(folder.name) + 1 :]: blob for blob in folder.blobs() if not blob.name.endswith("/")}
        self._blobs |= {f"{name}/{path}": blob for path, blob in blobs.items()}
        return [FileEntry(path=path, size=blob.size, crc32c=blob.crc32c) for path, blob in sorted(blobs.items())]

    def item(self, folder: str, entry: FileEntry) -> Item:
        from conversion_lib.publish.destinations.cloud_storage import StoredObject  # half a second to import

        placed = _placed(folder, entry)
        return Item(placed, StoredObject(self._blobs[placed.path]))


def _placed(folder: str, entry: FileEntry) -> FileEntry:
    return entry.model_copy(update={"path": f"{folder}/{entry.path}"})
