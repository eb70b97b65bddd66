"""Where a checkpoint is built: a directory, or a prefix in a bucket of Cloud Storage. What a sink needs of either."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from conversion_lib.files import in_parallel, sync_directory, write_atomically, write_first

SYNC_THREADS = 8
"""Without OCDBT there are as many directories as chunks, and syncing one is mostly waiting."""
REQUESTS = 32
"""To Cloud Storage at a time, where there are many objects."""
CLOUD_REQUESTS: dict[str, Any] = {"gcs_request_concurrency": {"limit": 64}}
"""TensorStore's settings for Cloud Storage. It tries again itself: up to 32 times, 1 s to 32 s apart."""
SCHEME = "gs://"


class Place(Protocol):
    """A file or a directory, by its path from there; a bucket has no directories, so that none need be made."""

    @property
    def spec(self) -> dict[str, Any]:
        """TensorStore's spec of the directory."""
        ...

    def __truediv__(self, path: str) -> Place: ...

    def read(self) -> bytes | None:
        """The file's content, None where there is no such file."""
        ...

    def write(self, content: bytes) -> None:
        """Writes the file, durably: a reader sees the old one or the new one."""
        ...

    def write_first(self, content: bytes) -> bool:
        """Writes the file unless it is there, and says whether: of several machines at once, only one does."""
        ...

    def make(self) -> None:
        """Makes the directory where there have to be any."""
        ...

    def below(self) -> list[str]:
        """Every file in the directory and below, by its path from here."""
        ...

    def remove(self, paths: Iterable[str]) -> None:
        """Removes those of the files below that are there."""
        ...

    def settle(self) -> None:
        """Returns when the names of what was written below are durable as well."""
        ...


@dataclass(frozen=True)
class LocalPlace:
    """A path on a file system of this machine."""

    path: Path

    @property
    def spec(self) -> dict[str, Any]:
        # a path, since a `file://` URL would read `%`, `#` and `?` as its own
        return {"driver": "file", "path": f"{self.path}/"}

    def __truediv__(self, path: str) -> LocalPlace:
        return LocalPlace(self.path / path)

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, content: bytes) -> None:
        write_atomically(self.path, content)

    def write_first(self, content: bytes) -> bool:
        return write_first(self.path, content)

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def below(self) -> list[str]:
        return [path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if not path.is_dir()]

    def remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            (self.path / path).unlink(missing_ok=True)

    def settle(self) -> None:
        directories = {path.parent for path in self.path.rglob("*")}
        in_parallel(lambda directory, _: sync_directory(directory), directories, threads=SYNC_THREADS)


@dataclass(frozen=True)
class CloudPlace:
    """An object, or a prefix of objects' names, in a bucket. Errors are BadInput or OutsideFailure, in one line."""

    bucket: str
    name: str
    client: Any = field(compare=False, repr=False)
    """The client's bucket: one for all places of a run, since it keeps connections."""

    @staticmethod
    def parse(url: str) -> CloudPlace:
        """The place at gs://bucket/prefix. Raises BadInput for another URL, and for a name that is not allowed."""
        from conversion_lib.destinations import cloud_client

        bucket, prefix = cloud_client.split_url(url)
        cloud_client.require_name(prefix, url)
        return CloudPlace(bucket, prefix, cloud_client.open_bucket(bucket))

    @property
    def spec(self) -> dict[str, Any]:
        return {"driver": "gcs", "bucket": self.bucket, "path": self._prefix}

    @property
    def _prefix(self) -> str:
        return f"{self.name}/" if self.name else ""

    @property
    def blob(self) -> Any:
        """The object, as the client has it."""
        return self.client.blob(self.name)

    def __truediv__(self, path: str) -> CloudPlace:
        name = "/".join(part for part in (self.name, path.strip("/")) if part)
        return CloudPlace(self.bucket, name, self.client)

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.name}"

    def read(self) -> bytes | None:
        from conversion_lib.destinations import cloud_client

        with cloud_client.explained(str(self), "read"):
            return cloud_client.read(self.blob)

    def write(self, content: bytes) -> None:
        self._upload(content)

    def write_first(self, content: bytes) -> bool:
        from google.api_core.exceptions import PreconditionFailed

        try:
            self._upload(content, if_generation_match=0)
        except PreconditionFailed:
            return self.read() == content  # ours, where the answer to a first try was lost; or the same
        return True

    def _upload(self, content: bytes, **conditions: int) -> None:
        from google.api_core.exceptions import PreconditionFailed

        from conversion_lib.destinations import cloud_client

        failed: PreconditionFailed | None = None
        with cloud_client.explained(str(self), "write"):
            try:
                self.blob.upload_from_string(content, checksum="crc32c", retry=cloud_client.RETRY, **conditions)
            except PreconditionFailed as error:
                failed = error
        if failed is not None:
            raise failed

    def make(self) -> None:
        """Nothing: an object's name needs no directory."""

    def below(self) -> list[str]:
        return [blob.name[len(self._prefix) :] for blob in self.blobs()]

    def blobs(self, beginning: str = "") -> list[Any]:
        """Every object below whose name begins so from here, with its generation and size."""
        from conversion_lib.destinations import cloud_client

        with cloud_client.explained(str(self), "list"):
            return list(self.client.list_blobs(prefix=self._prefix + beginning, retry=cloud_client.RETRY))

    def children(self) -> set[str]:
        """The names directly below, of objects and of prefixes."""
        from conversion_lib.destinations import cloud_client

        with cloud_client.explained(str(self), "list"):
            listing = self.client.list_blobs(prefix=self._prefix, delimiter="/", retry=cloud_client.RETRY)
            names = [blob.name for blob in listing] + [prefix.rstrip("/") for prefix in listing.prefixes]
        return {name[len(self._prefix) :] for name in names} - {""}

    def remove(self, paths: Iterable[str]) -> None:
        from google.api_core.exceptions import NotFound

        from conversion_lib.destinations import cloud_client

        def remove(path: str, stopped: object) -> None:
            with cloud_client.explained(str(self), "delete"):
                try:
                    (self / path).blob.delete(retry=cloud_client.RETRY)
                except NotFound:
                    return

        in_parallel(remove, list(paths), threads=REQUESTS)

    def settle(self) -> None:
        """Nothing: an object is durable when its upload is answered."""
