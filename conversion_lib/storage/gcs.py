"""Locations in a Cloud Storage bucket, and how a tree is written in place there. See `interface`."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

from conversion_lib.progress import SILENT, Reporter
from conversion_lib.storage.checksums import FileEntry
from conversion_lib.storage.files import in_parallel, write_atomically
from conversion_lib.storage.interface import SCHEME, Location, Tree
from conversion_lib.storage.lease import LEASE_NAME
from conversion_lib.storage.names import safe_path

if TYPE_CHECKING:
    from conversion_lib.storage.gcs_lease import BucketLease

LOG_LINE = re.compile(r"[0-9]{8}\.json")
"""The name of an object that holds a line of a log."""
REQUESTS = 32
"""Parallel requests to Cloud Storage for many objects."""
TENSORSTORE_REQUESTS: dict[str, Any] = {"gcs_request_concurrency": {"limit": 64}}
"""TensorStore's settings for Cloud Storage. It retries by itself: up to 32 times, 1 s to 32 s apart."""


@dataclass(frozen=True)
class BucketLocation:
    """An object, or a prefix of objects' names, in a bucket. See `Location`.

    Methods raise BadInput if the bucket, its name or the credentials are wrong, else OutsideFailure.
    """

    bucket: str
    name: str
    client: Any = field(compare=False, repr=False)
    """The client's bucket object. All locations of a run share it, since it keeps connections open."""

    @staticmethod
    def parse(url: str) -> BucketLocation:
        """Returns the location of gs://bucket/prefix. No request is made yet.

        Raises:
            BadInput: It is another URL, the name is not allowed, or there are no credentials.
        """
        from conversion_lib.storage import gcs_client as client

        bucket, prefix = client.split_url(url)
        client.require_name(prefix, url)
        return BucketLocation(bucket, prefix, client.open_bucket(bucket))

    @property
    def handle(self) -> str:
        return str(self)

    @property
    def spec(self) -> dict[str, Any]:
        return {"driver": "gcs", "bucket": self.bucket, "path": self._prefix}

    @property
    def local(self) -> None:
        return None

    @property
    def parent(self) -> BucketLocation:
        return BucketLocation(self.bucket, self.name.rpartition("/")[0], self.client)

    def absolute(self) -> BucketLocation:
        return self

    @property
    def _prefix(self) -> str:
        return f"{self.name}/" if self.name else ""

    @property
    def blob(self) -> Any:
        """The client's object. No request is made yet."""
        return self.client.blob(self.name)

    def __truediv__(self, path: str) -> BucketLocation:
        return BucketLocation(self.bucket, self._prefix + safe_path(path, self), self.client)

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.name}"

    def read(self) -> bytes | None:
        from conversion_lib.storage import gcs_client as client

        with client.explained(str(self), "read"):
            return client.read(self.blob)

    def write(self, content: bytes) -> None:
        self._upload(content)

    def write_first(self, content: bytes) -> bool:
        from google.api_core.exceptions import PreconditionFailed

        try:
            self._upload(content, if_generation_match=0)
        except PreconditionFailed:
            return self.read() == content  # written by us if the response to a first try was lost; or the same
        return True

    def _upload(self, content: bytes, **conditions: int) -> None:
        from google.api_core.exceptions import PreconditionFailed

        from conversion_lib.storage import gcs_client as client

        failed: PreconditionFailed | None = None
        with client.explained(str(self), "write"):
            try:
                self.blob.upload_from_string(content, checksum="crc32c", retry=client.RETRY, **conditions)
            except PreconditionFailed as error:
                failed = error
        if failed is not None:
            raise failed

    def make(self) -> None:
        """Nothing: an object's name needs no directory."""

    def below(self) -> list[str]:
        return [blob.name[len(self._prefix) :] for blob in self.blobs()]

    def blobs(self, beginning: str = "") -> list[Any]:
        """Lists the objects below whose relative name starts with `beginning`, with generation and size."""
        from conversion_lib.storage import gcs_client as client

        with client.explained(str(self), "list"):
            return list(self.client.list_blobs(prefix=self._prefix + beginning, retry=client.RETRY))

    def children(self) -> set[str]:
        """The names directly below, of objects and of prefixes."""
        from conversion_lib.storage import gcs_client as client

        with client.explained(str(self), "list"):
            listing = self.client.list_blobs(prefix=self._prefix, delimiter="/", retry=client.RETRY)
            names = [blob.name for blob in listing] + [prefix.rstrip("/") for prefix in listing.prefixes]
        return {name[len(self._prefix) :] for name in names} - {""}

    def versions(self) -> Iterator[tuple[str, int, int]]:
        """Every object below, with its bytes and its generation."""
        return ((blob.name[len(self._prefix) :], blob.size, int(blob.generation)) for blob in self.blobs())

    def copy_to(self, path: Path) -> None:
        if (content := self.read()) is not None:
            write_atomically(path, content)

    def remove(self, paths: Iterable[str]) -> None:
        from google.api_core.exceptions import NotFound

        from conversion_lib.storage import gcs_client as client

        def remove(path: str, stopped: object) -> None:
            with client.explained(str(self), "delete"):
                try:
                    self.client.blob(self._prefix + path).delete(retry=client.RETRY)
                except NotFound:
                    return

        in_parallel(remove, list(paths), threads=REQUESTS)

    def entries(
        self, *, sums: Location | None = None, reporter: Reporter = SILENT, task: str = "reading"
    ) -> list[FileEntry]:
        """Lists the objects with the CRC32Cs that the service keeps. No object is read, and `sums` is ignored."""
        blobs = (blob for blob in self.blobs() if not blob.name.endswith("/"))
        entries = [entry_of(blob.name[len(self._prefix) :], blob) for blob in blobs]
        return sorted(entries, key=lambda entry: entry.path)

    def stored(self, entry: FileEntry) -> StoredGeneration:
        return StoredGeneration((self / entry.path).blob, entry.generation or 0)

    def lease(self, on_lost: Callable[[], None] = lambda: None) -> BucketLease:
        from conversion_lib.storage.gcs_lease import BucketLease

        return BucketLease(self.blob, on_lost)

    def log(self) -> BucketLog:
        return BucketLog(self)

    def staging(self, tree: Tree) -> MarkerStaging:
        return MarkerStaging(self, tree)

    def settle(self) -> None:
        """Nothing: an object is durable when its upload returns."""


def entry_of(path: str, blob: Any) -> FileEntry:
    """Returns the entry, with this path, of an object that the client has listed or written."""
    return FileEntry(path=path, size=blob.size, crc32c=blob.crc32c or "", generation=int(blob.generation))


class StoredGeneration:
    """One generation of an object. See `StoredObject`."""

    def __init__(self, blob: Any, generation: int) -> None:
        self.bucket, self.name, self.generation = str(blob.bucket.name), str(blob.name), generation
        self._blob = blob

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        from conversion_lib.storage import gcs_client as client

        return cast(IO[bytes], self._blob.open(mode, if_generation_match=self.generation, retry=client.RETRY))


class BucketLog:
    """A log whose lines are objects below `location`, since objects cannot be appended to."""

    def __init__(self, location: BucketLocation) -> None:
        self._location, self._next = location, 0

    def replay(self, take: Callable[[bytes], bool]) -> None:
        # anything else there is no line of the log
        names = [name for name in self._location.below() if LOG_LINE.fullmatch(name)]
        for line in in_parallel(lambda name, _: (self._location / name).read(), names, threads=REQUESTS):
            take(line or b"")
        self._next = 1 + max((int(name.removesuffix(".json")) for name in names), default=-1)

    def open(self) -> None:
        """Nothing: every line is a separate object."""

    def append(self, line: bytes) -> None:
        (self._location / f"{self._next:08d}.json").write(line)
        self._next += 1

    def exists(self) -> bool:
        return bool(self._location.below())

    def remove(self) -> None:
        self._location.remove(self._location.below())

    def close(self) -> None:
        """Nothing, as for `open`."""


class MarkerStaging:
    """A tree below `root`. It is complete when its first marker is there, which is written last and removed first."""

    def __init__(self, root: BucketLocation, tree: Tree) -> None:
        self.tree, self._root = tree, root

    @property
    def shown(self) -> str:
        return str(self._root)

    @property
    def final(self) -> BucketLocation:
        return self._root / self.tree.final

    @property
    def build(self) -> BucketLocation:
        return self.final

    @property
    def work(self) -> BucketLocation:
        return self._root / self.tree.work

    @contextmanager
    def drafts(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="ferry-beside-") as name:
            yield Path(name)
            for path in sorted(Path(name).rglob("*")):
                if path.is_file():
                    (self._root / path.relative_to(name).as_posix()).write_first(path.read_bytes())

    def exists(self) -> bool:
        return self.tree.final in self._root.children()

    def whole(self) -> bool:
        return self.read(self.tree.markers[0]) is not None

    def read(self, name: str) -> bytes | None:
        return (self._root / name).read()

    def begun(self) -> bool:
        return self.tree.work in self._root.children()

    def building(self) -> bool:
        return not self.whole()

    def committing(self) -> bool:
        return False

    def strangers(self) -> list[str]:
        return sorted(self._root.children() - self.tree.ours - set(self.tree.guests))

    def prepare(self, needed_bytes: int) -> None:
        """Nothing: a bucket has no limit and no directories."""

    def begin(self) -> None:
        for marker in self.tree.markers:
            self._root.remove([marker])
        self.clear()

    def restore(self) -> None:
        """Nothing: what is replaced is removed before the first write, not at the commit."""

    def commit(self) -> None:
        """Removes the work directory. Readers have seen the checkpoint since its marker was written."""
        self.clear()

    def clear(self) -> None:
        below = [f"{self.tree.work}/{path}" for path in self.work.below()] if self.whole() else self._root.below()
        ours = [path for path in below if self._is_ours(path)]
        # the record and the notes go last, so that an interrupted removal can be resumed
        last = [path for path in (self.tree.record, *self.tree.notes) if path in ours]
        self._root.remove(path for path in ours if path not in last)
        for path in last:
            self._root.remove([path])

    def _is_ours(self, path: str) -> bool:
        return path.partition("/")[0] in self.tree.ours and not path.startswith(f"{self.tree.work}/{LEASE_NAME}")
