"""Where a checkpoint is built: a directory, or a prefix in a bucket of Cloud Storage. What a sink needs of either."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from conversion_lib.errors import BadInput
from conversion_lib.storage.files import in_parallel, sync_directory, write_atomically, write_first

SCHEME = "gs://"
SYNC_THREADS = 8
"""Without OCDBT there are as many directories as chunks, and syncing one is mostly waiting."""


class Location(Protocol):
    """A file or a directory, by its path from there; a bucket has no directories, so that none need be made."""

    @property
    def spec(self) -> dict[str, Any]:
        """TensorStore's spec of the directory."""
        ...

    def __truediv__(self, path: str) -> Location: ...

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
class LocalLocation:
    """A path on a file system of this machine."""

    path: Path

    @property
    def spec(self) -> dict[str, Any]:
        # a path, since a `file://` URL would read `%`, `#` and `?` as its own
        return {"driver": "file", "path": f"{self.path}/"}

    def __truediv__(self, path: str) -> LocalLocation:
        return LocalLocation(self.path / path)

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


def location(where: Path | str) -> Location:
    """The location that a path or gs://bucket/prefix names.

    Raises BadInput for another URL scheme.
    """
    text = str(where)
    if text.startswith(SCHEME):
        from conversion_lib.storage.gcs import BucketLocation  # its client takes long to import

        return BucketLocation.parse(text)
    if "://" in text:
        raise BadInput(f"{text}: expected a directory or gs://bucket/prefix")
    return LocalLocation(Path(where))
