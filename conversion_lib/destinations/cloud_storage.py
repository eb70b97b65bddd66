"""A location in Cloud Storage: objects are written in place, each under a precondition, and the marker last.

Every write names the generation it replaces (0: none), and CRC32C is compared with what the service stored. One run
at a time writes to a location: it holds a claim, an object that it rewrites every few seconds. A claim that stands
still is a dead run's, and is taken over; no clock is compared with another.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import google.auth.exceptions
from google.api_core import exceptions
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption

from conversion_lib.destinations.base import MANIFEST_NAME, MARKER_NAME, Item, Manifest
from conversion_lib.errors import BadInput, FerryError, OutsideFailure
from conversion_lib.manifest import FileEntry
from conversion_lib.progress import Reporter
from conversion_lib.record import COMMIT_NAME

UPLOAD_CHUNK_BYTES = 16 << 20
"""Held in memory for each upload of a large file; a multiple of 256 KiB, as the service wants."""
ORBAX_COMMIT = f"0/{COMMIT_NAME}"
UPDATE_TRIES = 5
CLAIM_NAME = ".ferry_claim.json"
BEAT_SECONDS = 10.0
"""A claim is rewritten that often (an object takes one write a second)."""
DEAD_SECONDS = 60.0
"""A claim that has not changed for so long is nobody's."""
POLL_SECONDS = 1.0


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
        self._claim = Claim(self._blob(CLAIM_NAME))

    @property
    def url(self) -> str:
        return f"gs://{self.bucket_name}/{self.prefix}"

    @contextmanager
    def exclusive(self, reporter: Reporter) -> Iterator[None]:
        with self._explained("claim the place"):
            self._claim.take(lambda: reporter.say(f"another run is publishing to {self.url}: waiting for it"))
        with self._claim.kept_alive():
            yield

    def read(self, path: str) -> bytes | None:
        with self._explained("read"):
            return _read(self._blob(path))

    def begin(self, manifest: Manifest) -> set[str]:
        with self._explained("list"):
            self._there = {self._relative(blob): blob for blob in self._bucket.list_blobs(prefix=self._root)}
            kept = {e.path for e in manifest.files if self._same(e)}
            paths = {entry.path for entry in manifest.files}
            strays = self._there.keys() - paths - {MANIFEST_NAME, MARKER_NAME, CLAIM_NAME}
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
        self._require_claim()
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
        with self._explained("keep the claim"):
            self._claim.beat()
        self._require_claim()
        self._write(MARKER_NAME, marker)

    def _require_claim(self) -> None:
        if self._claim.lost.is_set():
            raise OutsideFailure(f"another run took {self.url} over while this one stood still: run again")

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


class Claim:
    """The right to write to a location, as the object `blob`; `lost` is set when another run has taken it over."""

    def __init__(self, blob: Any) -> None:
        self._blob, self._run = blob, uuid.uuid4().hex
        self._beats, self._generation = 0, 0
        self._lock = threading.Lock()
        self.lost = threading.Event()

    def take(self, waiting: Callable[[], None]) -> None:
        """Returns when this run holds the claim; calls `waiting` once where another one has it."""
        seen, since = 0, time.monotonic()
        while True:
            there = self._blob.bucket.get_blob(self._blob.name)
            self._generation = int(there.generation) if there else 0
            if self._generation != seen:
                if there and not seen:
                    waiting()
                seen, since = self._generation, time.monotonic()
            if there is None or time.monotonic() - since >= DEAD_SECONDS:
                self.lost.clear()
                self.beat()
                if not self.lost.is_set():
                    return
            time.sleep(POLL_SECONDS)

    def beat(self) -> None:
        """Rewrites the claim, unless another run has: then it is lost."""
        with self._lock:
            self._beats += 1
            content = json.dumps({"run": self._run, "beats": self._beats}).encode()
            try:
                self._blob.upload_from_string(
                    content, content_type="application/json", if_generation_match=self._generation
                )
            except exceptions.PreconditionFailed:
                if _read(self._blob) != content:  # else ours, where the answer to a first try was lost
                    self.lost.set()
                    return
                self._blob.reload()
            self._generation = int(self._blob.generation)

    @contextmanager
    def kept_alive(self) -> Iterator[None]:
        """Beats in the background, and gives the claim back at the end."""
        over = threading.Event()

        def run() -> None:
            while not over.wait(BEAT_SECONDS):
                # an outage: the next beat tells whether another run has taken over meanwhile
                with suppress(exceptions.GoogleAPIError, google.auth.exceptions.GoogleAuthError, OSError):
                    self.beat()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(BEAT_SECONDS)
            # where it cannot be deleted, the next run sees it stand still
            with suppress(exceptions.GoogleAPIError, google.auth.exceptions.GoogleAuthError, OSError):
                self._blob.delete(if_generation_match=self._generation)


def _read(blob: Any) -> bytes | None:
    try:
        return bytes(blob.download_as_bytes())
    except exceptions.NotFound:
        return None
