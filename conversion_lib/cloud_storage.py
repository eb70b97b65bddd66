"""A location in Cloud Storage: objects are written in place, each under a precondition, and the marker last.

Every write names the generation it replaces (0: none). Two publishers of different things therefore cannot mix: the
second one's write is refused. CRC32C is compared with what the service stored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from urllib.parse import urlsplit

import google.auth.exceptions
from google.api_core import exceptions
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption

from conversion_lib.destinations import MANIFEST_NAME, MARKER_NAME, Item, Manifest
from conversion_lib.errors import BadInput, FerryError, OutsideFailure
from conversion_lib.manifest import COMMIT_NAME, FileEntry
from conversion_lib.progress import Reporter

UPLOAD_CHUNK_BYTES = 16 << 20
"""Held in memory for each upload of a large file; a multiple of 256 KiB, as the service wants."""
ORBAX_COMMIT = f"0/{COMMIT_NAME}"
UPDATE_TRIES = 5


class CloudStorageDestination:
    """`base` is gs://bucket or gs://bucket/prefix. Credentials are the application default ones."""

    def __init__(self, base: str, path: str) -> None:
        parts = urlsplit(base)
        if not parts.netloc:
            raise BadInput(f"{base}: expected gs://bucket/prefix")
        self.base = parts.path.strip("/")
        self.prefix = "/".join(part for part in (self.base, path) if part)
        self.bucket_name = parts.netloc
        with self._explained("open"):
            self._bucket = storage.Client(project=None).bucket(self.bucket_name)
        self._there: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return f"gs://{self.bucket_name}/{self.prefix}"

    def exclusive(self, reporter: Reporter) -> AbstractContextManager[None]:
        return nullcontext()  # the preconditions do it

    def read(self, path: str) -> bytes | None:
        with self._explained("read"):
            return _read(self._blob(path))

    def begin(self, manifest: Manifest) -> set[str]:
        with self._explained("list"):
            self._there = {self._relative(blob): blob for blob in self._bucket.list_blobs(prefix=self._root)}
            kept = {e.path for e in manifest.files if self._same(e)}
            paths = {entry.path for entry in manifest.files}
            strays = self._there.keys() - paths - {MANIFEST_NAME, MARKER_NAME}
            if kept != paths:
                # an Orbax reader takes the checkpoint for whole while this one is there
                strays |= {ORBAX_COMMIT} & self._there.keys()
                kept.discard(ORBAX_COMMIT)
            for path in sorted(strays):
                blob = self._there.pop(path)
                blob.delete(if_generation_match=blob.generation)
        return kept

    def put(self, item: Item, advance: Callable[[int], None], stopped: threading.Event) -> None:
        if stopped.is_set():
            return
        entry, blob = item.entry, self._blob(item.entry.path)
        blob.chunk_size = UPLOAD_CHUNK_BYTES
        with self._explained(f"write {entry.path}"):
            try:
                with item.open() as source:
                    blob.upload_from_file(
                        source, size=entry.size, if_generation_match=self._generation(entry.path), checksum="crc32c"
                    )
            except exceptions.PreconditionFailed:
                # ours, where the answer to a first try was lost; or another publisher's
                blob.reload()
                if (blob.size, blob.crc32c) != (entry.size, entry.crc32c):
                    raise OutsideFailure(
                        f"another run is publishing to {self.url}: run again when it is done"
                    ) from None
        if (blob.size, blob.crc32c) != (entry.size, entry.crc32c):
            raise OutsideFailure(
                f"{entry.path} changed while it was published (expected {entry.size} bytes with crc32c {entry.crc32c},"
                f" {self.url} has {blob.size} with {blob.crc32c}): run again when nothing writes to the checkpoint"
            )
        advance(entry.size)

    def commit(self, manifest: bytes, marker: bytes) -> None:
        self._write(MANIFEST_NAME, manifest)
        self._write(MARKER_NAME, marker)

    def _write(self, path: str, content: bytes) -> None:
        blob = self._blob(path)
        with self._explained(f"write {path}"):
            try:
                blob.upload_from_string(
                    content, content_type="application/json", if_generation_match=self._generation(path)
                )
            except exceptions.PreconditionFailed:
                if _read(blob) != content:
                    raise OutsideFailure(f"another run has published to {self.url}: run again to see what") from None

    def entries(self, reporter: Reporter) -> list[FileEntry]:
        with self._explained("list"):
            blobs = self._bucket.list_blobs(prefix=self._root)
            entries = [FileEntry(path=self._relative(b), size=b.size, crc32c=b.crc32c or "") for b in blobs]
        return sorted(entries, key=lambda entry: entry.path)

    def update(self, path: str, change: Callable[[bytes | None], bytes | None]) -> None:
        name = "/".join(part for part in (self.base, path) if part)
        with self._explained(f"write {path}"):
            for _ in range(UPDATE_TRIES):
                there = self._bucket.get_blob(name)
                generation = there.generation if there else 0
                old = there.download_as_bytes(if_generation_match=generation) if there else None
                if (changed := change(old)) is None:
                    return
                blob = self._bucket.blob(name)
                try:
                    blob.upload_from_string(changed, "application/json", if_generation_match=generation)
                    return
                except exceptions.PreconditionFailed:
                    continue  # someone else updated it in between
        raise OutsideFailure(f"gs://{self.bucket_name}/{name} changes faster than it can be updated: run again")

    @property
    def _root(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def _blob(self, path: str) -> Any:
        return self._bucket.blob(self._root + path)

    def _relative(self, blob: Any) -> str:
        return str(blob.name)[len(self._root) :]

    def _same(self, entry: FileEntry) -> bool:
        blob = self._there.get(entry.path)
        return blob is not None and (blob.size, blob.crc32c) == (entry.size, entry.crc32c)

    def _generation(self, path: str) -> int:
        """The generation that a write to `path` replaces; 0 where there was nothing when this run began."""
        blob = self._there.get(path)
        return int(blob.generation) if blob is not None else 0

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Turns what the client raises into one line."""
        try:
            yield
        except FerryError:
            raise
        except google.auth.exceptions.DefaultCredentialsError as error:
            raise BadInput(
                f"no credentials for gs://{self.bucket_name}: run `gcloud auth application-default login`, or set"
                " GOOGLE_APPLICATION_CREDENTIALS"
            ) from error
        except exceptions.NotFound as error:
            raise BadInput(f"cannot {doing} in {self.url}: no bucket {self.bucket_name}, or it went away") from error
        except (exceptions.Forbidden, exceptions.Unauthorized) as error:
            raise BadInput(
                f"cannot {doing} in {self.url}: the credentials do not allow it (HTTP {error.code}); they need"
                " storage.objects.create, get, list and delete"
            ) from error
        except exceptions.BadRequest as error:
            raise BadInput(f"cannot {doing} in {self.url}: {error.message}") from error
        except (exceptions.GoogleAPIError, google.auth.exceptions.GoogleAuthError, DataCorruption, OSError) as error:
            raise OutsideFailure(f"cannot {doing} in {self.url}: {str(error).splitlines()[0][:300]}") from error


def _read(blob: Any) -> bytes | None:
    try:
        return bytes(blob.download_as_bytes())
    except exceptions.NotFound:
        return None
