"""A destination in Cloud Storage: objects are written in place, each under a precondition, and the marker last.

Every write names the generation that it replaces (0: none), and its CRC32C is compared with what the service stored.
Only the run that holds the location's lease writes. manifest.json lists what it will write before the first object is
there, so that a later run can tell the leftovers of a killed run from other objects.
"""

from __future__ import annotations

import io
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from google.api_core import exceptions
from pydantic import ValidationError

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.progress import Reporter
from conversion_lib.publish.destinations.base import (
    LEASE_NAME,
    LEVELS,
    MANIFEST_NAME,
    MARKER_NAME,
    OWN_NAMES,
    Item,
    StoredVersion,
)
from conversion_lib.publish.manifest import Manifest
from conversion_lib.record import COMMIT_NAME
from conversion_lib.storage import gcs_client as client
from conversion_lib.storage.checksums import FileEntry, file_crc32c
from conversion_lib.storage.files import in_parallel
from conversion_lib.storage.gcs import BucketLocation, entry_of
from conversion_lib.storage.gcs_client import delete, explained
from conversion_lib.storage.interface import StoredObject

UPLOAD_CHUNK_BYTES = 16 << 20
"""Held in memory for each upload of a large file. The service requires a multiple of 256 KiB."""
ORBAX_COMMIT = f"0/{COMMIT_NAME}"
PROBE_NAME = ".ferry_probe"
"""An object that never exists. Deleting it tests the permission to delete."""
UPDATE_TRIES = 10
DELETING_THREADS = 8


class CloudStorageDestination:
    """The location `path` under `base`, gs://bucket or gs://bucket/prefix, with the application default credentials."""

    def __init__(self, base: str, path: str) -> None:
        self.bucket_name, self.base = client.split_url(base)
        self.prefix = "/".join(part for part in (self.base, path) if part)
        client.require_name(self._root + LEASE_NAME, base)
        self._location = BucketLocation(self.bucket_name, self.prefix, client.open_bucket(self.bucket_name))
        self._bucket = self._location.client
        self._there: dict[str, Any] = {}
        self._lease = (self._location / LEASE_NAME).lease()

    @property
    def url(self) -> str:
        return f"gs://{self.bucket_name}/{self.prefix}"

    def exclusive(self, reporter: Reporter) -> AbstractContextManager[None]:
        return self._lease.waited_for(lambda: reporter.say(f"another run is publishing to {self.url}: waiting for it"))

    def read(self, path: str) -> bytes | None:
        with explained(self.url, "read"):
            return client.read(self._blob(path))

    def begin(self, manifest: Manifest) -> dict[str, FileEntry]:
        paths = {entry.path for entry in manifest.files}
        for path in paths:
            client.require_name(self._root + path, self.url)
        with explained(self.url, "list"):
            self._there = {self._relative(blob): blob for blob in self._list()}
            strays = self._there.keys() - paths - OWN_NAMES
            if foreign := sorted(strays - self._begun()):
                raise BadInput(
                    f"{self.url} holds something that is not a published checkpoint ({foreign[0]}): give another"
                    " destination, or remove it"
                )
            kept = {
                entry.path: entry_of(entry.path, self._there[entry.path])
                for entry in manifest.files
                if self._same(entry)
            }
            if kept.keys() != paths:
                # fails now, and not after the upload, if the credentials cannot delete what the commit replaces
                delete(self._bucket.blob(self._root + PROBE_NAME, generation=1))
                # an Orbax reader takes the checkpoint for complete while this object is there
                strays |= {ORBAX_COMMIT} & self._there.keys()
                kept.pop(ORBAX_COMMIT, None)
            self._delete([self._there.pop(path) for path in sorted(strays)])
        self._write(MANIFEST_NAME, manifest.to_json())
        return kept

    def _begun(self) -> set[str]:
        """Returns the paths that an earlier try, which did not commit, was going to write here."""
        if MANIFEST_NAME not in self._there:
            return set()
        try:
            earlier = Manifest.model_validate_json(client.read(self._blob(MANIFEST_NAME)) or b"")
        except ValidationError:
            return set()
        return {entry.path for entry in earlier.files}

    def put(self, item: Item, advance: Callable[[int], None], stopped: threading.Event) -> FileEntry:
        self._lease.require(self.url)
        entry, blob = item.entry, self._blob(item.entry.path)
        with explained(self.url, f"write {entry.path}"):
            try:
                if isinstance(item.source, Path | bytes):
                    self._upload(item, blob, advance, stopped)
                else:
                    self._copy(item.source, blob, entry)
                    advance(entry.size)
            except exceptions.PreconditionFailed:
                # written by us if the response to a first try was lost; else by another run
                blob.reload(retry=client.RETRY)
                if not _is(blob, entry):
                    raise OutsideFailure(
                        f"another run is publishing to {self.url}: run again when it is done"
                    ) from None
            except exceptions.BadRequest:
                if not isinstance(item.source, Path) or file_crc32c(item.source) == entry.crc32c:
                    raise
                raise self._changed(entry, "a file with other bytes") from None
        if not _is(blob, entry):
            raise self._changed(entry, f"{blob.size} bytes with {blob.crc32c}")
        return entry_of(entry.path, blob)

    def _upload(self, item: Item, blob: Any, advance: Callable[[int], None], stopped: threading.Event) -> None:
        blob.chunk_size = UPLOAD_CHUNK_BYTES
        with item.open() as source:
            blob.upload_from_file(
                _Watched(source, advance, stopped),
                size=item.entry.size,
                if_generation_match=self._generation(item.entry.path),
                checksum="crc32c",
                crc32c_checksum_value=item.entry.crc32c,
                retry=client.RETRY,
            )

    def _copy(self, source: StoredObject, blob: Any, entry: FileEntry) -> None:
        """Copies an object within the service, in as many calls as it needs."""
        original = blob.client.bucket(source.bucket).blob(source.name, generation=source.generation)
        token = ""
        while token is not None:
            token, _, _ = blob.rewrite(
                original,
                token=token or None,
                if_generation_match=self._generation(entry.path),
                if_source_generation_match=source.generation,
                retry=client.RETRY,
            )

    def _changed(self, entry: FileEntry, found: str) -> OutsideFailure:
        return OutsideFailure(
            f"{entry.path} changed while it was published (expected {entry.size} bytes with crc32c {entry.crc32c},"
            f" found {found}): run again when nothing writes to the checkpoint"
        )

    def commit(self, manifest: bytes, marker: bytes) -> None:
        self._write(MANIFEST_NAME, manifest)
        self._lease.heartbeat()
        self._lease.require(self.url)
        self._write(MARKER_NAME, marker)

    def _write(self, path: str, content: bytes) -> None:
        blob = self._blob(path)
        with explained(self.url, f"write {path}"):
            try:
                blob.upload_from_string(
                    content,
                    content_type="application/json",
                    if_generation_match=self._generation(path),
                    retry=client.RETRY,
                )
            except exceptions.PreconditionFailed:
                if client.read(blob) != content:
                    raise OutsideFailure(f"another run has published to {self.url}: run again to compare") from None
                blob.reload(retry=client.RETRY)
        self._there[path] = blob

    def entries(self, reporter: Reporter) -> list[FileEntry]:
        return self._location.entries()

    def remove(self) -> None:
        with explained(self.url, "remove"):
            blobs = {self._relative(blob): blob for blob in self._list()}
            first = [blobs.pop(path) for path in (MARKER_NAME, ORBAX_COMMIT) if path in blobs]
            last = [blobs.pop(path) for path in (MANIFEST_NAME,) if path in blobs]  # identifies the rest until then
            blobs.pop(LEASE_NAME, None)  # released by `exclusive`
            for blob in first:
                delete(blob)
            self._delete(list(blobs.values()))
            self._delete(last)

    def locations(self) -> list[StoredVersion]:
        with explained(self.url, "list"):
            grouped: dict[str, dict[str, Any]] = defaultdict(dict)
            for blob in self._list():
                *place, path = self._relative(blob).split("/", LEVELS)
                if len(place) == LEVELS:
                    grouped["/".join(place)][path] = blob
        return [
            StoredVersion(
                path=place,
                committed=MARKER_NAME in blobs,
                files=len(blobs),
                bytes=sum(blob.size for blob in blobs.values()),
                touched=max(blob.updated.timestamp() for blob in blobs.values()),
            )
            for place, blobs in sorted(grouped.items())
            if MARKER_NAME in blobs or MANIFEST_NAME in blobs
        ]

    def update(self, path: str, change: Callable[[bytes | None], bytes | None]) -> None:
        name = "/".join(part for part in (self.base, path) if part)
        with explained(self.url, f"write {path}"):
            for _ in range(UPDATE_TRIES):
                there = self._bucket.get_blob(name, retry=client.RETRY)
                generation = there.generation if there else 0
                try:
                    old = there.download_as_bytes(if_generation_match=generation, retry=client.RETRY) if there else None
                    if (changed := change(old)) is None:
                        return
                    self._bucket.blob(name).upload_from_string(
                        changed, "application/json", if_generation_match=generation, retry=client.RETRY
                    )
                    return
                except (exceptions.PreconditionFailed, exceptions.NotFound):
                    continue  # another run updated it in between; or the response was lost, and there is nothing to do
        raise OutsideFailure(f"gs://{self.bucket_name}/{name} changes faster than it can be updated: run again")

    @property
    def _root(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def _list(self) -> Iterator[Any]:
        """Returns every object here, without the placeholders that some programs write for directories."""
        found = self._bucket.list_blobs(prefix=self._root, retry=client.RETRY)
        return (blob for blob in found if not blob.name.endswith("/"))

    def _delete(self, blobs: list[Any]) -> None:
        in_parallel(lambda blob, stopped: delete(blob), blobs, threads=DELETING_THREADS)

    def _blob(self, path: str) -> Any:
        return self._bucket.blob(self._root + path)

    def _relative(self, blob: Any) -> str:
        return str(blob.name)[len(self._root) :]

    def _same(self, entry: FileEntry) -> bool:
        blob = self._there.get(entry.path)
        return blob is not None and _is(blob, entry)

    def _generation(self, path: str) -> int:
        """Returns the generation that a write to `path` replaces; 0 if there was none when this run began."""
        blob = self._there.get(path)
        return int(blob.generation) if blob is not None else 0


def _is(blob: Any, entry: FileEntry) -> bool:
    return (blob.size, blob.crc32c) == (entry.size, entry.crc32c)


class _Watched(io.RawIOBase):
    """A stream that reports its progress, and fails once the work is stopped."""

    def __init__(self, stream: IO[bytes], advance: Callable[[int], None], stopped: threading.Event) -> None:
        self._stream, self._advance, self._stopped = stream, advance, stopped

    def read(self, size: int = -1) -> bytes:
        if self._stopped.is_set():
            raise OutsideFailure("stopped, since another file could not be written")
        block = self._stream.read(size)
        self._advance(len(block))
        return block

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)
