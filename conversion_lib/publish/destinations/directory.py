"""A destination in a directory."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG

from pydantic import ValidationError

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.progress import Reporter
from conversion_lib.publish.destinations.base import LEASE_NAME, LEVELS, MANIFEST_NAME, MARKER_NAME, Item, StoredVersion
from conversion_lib.publish.manifest import Manifest
from conversion_lib.storage.checksums import FileEntry, copy_checked, entries_below, list_files
from conversion_lib.storage.disk import check_disk
from conversion_lib.storage.files import disk_error, expanded, one_at_a_time, sync_directory, write_atomically
from conversion_lib.storage.lease import FileLease
from conversion_lib.storage.links import refuse_links_in
from conversion_lib.storage.names import path_below

PARTIAL = ".ferry-partial"


class DirectoryDestination:
    """The location `path` under the directory `base`: built in a hidden sibling, which is renamed when complete."""

    def __init__(self, base: Path, path: str) -> None:
        self.base = expanded(base).absolute()
        self.location = self.base / path
        name = self.location.name
        self.staging = self.location.with_name(f".{name}{PARTIAL}")
        self._lease = FileLease(self.location.with_name(f".{name}{LEASE_NAME}"))

    @property
    def url(self) -> str:
        return str(self.location)

    @contextmanager
    def exclusive(self, reporter: Reporter) -> Iterator[None]:
        def waiting() -> None:
            reporter.say(f"another run is publishing to {self.url}: waiting for it")

        try:
            with self._lease.waited_for(waiting):
                yield
            with suppress(OSError):
                self.location.parent.rmdir()  # the directory of a commit whose last target was removed
        except OSError as error:
            raise disk_error(error, f"cannot write to {self.url}") from error

    def read(self, path: str) -> bytes | None:
        try:
            return (self.location / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise disk_error(error, f"cannot read {self.location / path}") from error

    def begin(self, manifest: Manifest) -> dict[str, FileEntry]:
        refuse_links_in(self.staging)
        if self.location.exists() and (not self.location.is_dir() or any(self.location.iterdir())):
            raise BadInput(
                f"{self.url} holds something that is not a published checkpoint (no {MARKER_NAME}): give another"
                " destination, or remove it"
            )
        kept = self._sweep(manifest)
        check_disk(self.location, sum(entry.size for entry in manifest.files if entry.path not in kept))
        self.staging.mkdir(parents=True, exist_ok=True)
        # the files that this try will write: the next one keeps those that it finds with the same entry
        write_atomically(self.staging / MANIFEST_NAME, manifest.model_dump_json().encode())
        return kept

    def _sweep(self, manifest: Manifest) -> dict[str, FileEntry]:
        """Removes files from the staging directory that are half-written or belong to another manifest."""
        there = list_files(self.staging)
        begun: set[FileEntry] = set()
        if MANIFEST_NAME in there:
            try:
                begun = set(Manifest.model_validate_json((self.staging / MANIFEST_NAME).read_bytes()).files)
            except ValidationError:
                begun = set()
        kept = {e.path: e for e in manifest.files if e in begun and there.get(e.path) == e.size}
        for path in there.keys() - kept.keys():
            (self.staging / path).unlink()
        return kept

    def put(self, item: Item, advance: Callable[[int], None], stopped: threading.Event) -> FileEntry:
        path = path_below(self.staging, item.entry.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        with item.open() as source, part.open("wb") as target:
            right = copy_checked(source, target, item.entry, advance, stopped)
            target.flush()
            os.fsync(target.fileno())
        if not right:
            raise OutsideFailure(
                f"{item.entry.path} changed while it was published (expected {item.entry.size} bytes with crc32c"
                f" {item.entry.crc32c}): run again when nothing writes to the checkpoint"
            )
        part.replace(path)
        return item.entry

    def commit(self, manifest: bytes, marker: bytes) -> None:
        self._lease.heartbeat()
        self._lease.require(self.url)
        write_atomically(self.staging / MANIFEST_NAME, manifest)
        write_atomically(self.staging / MARKER_NAME, marker)
        for directory, _, _ in os.walk(self.staging):
            sync_directory(Path(directory))
        self.staging.replace(self.location)
        sync_directory(self.location.parent)

    def entries(self, reporter: Reporter) -> list[FileEntry]:
        return entries_below(self.location, reporter=reporter, task=f"verifying {self.url}")

    def remove(self) -> None:
        refuse_links_in(self.staging)
        try:
            if self.location.exists():
                shutil.rmtree(self.staging, ignore_errors=True)
                self.location.replace(self.staging)  # atomic: readers never see half of it
                sync_directory(self.location.parent)
            if self.staging.exists():
                shutil.rmtree(self.staging)
        except OSError as error:
            raise disk_error(error, f"cannot remove {self.url}") from error

    def locations(self) -> list[StoredVersion]:
        under = "/".join(["*"] * (LEVELS - 1))
        marked = {marker.parent for marker in self.location.glob(f"{under}/*/{MARKER_NAME}")}
        whole = {path for path in marked if not path.name.startswith(".") and self._holds(path)}
        parts = [path for path in self.location.glob(f"{under}/.*{PARTIAL}") if self._holds(path)]
        targets = {path: path for path in whole} | {
            path: path.with_name(path.name[1 : -len(PARTIAL)]) for path in parts
        }
        found = []
        for path, target in targets.items():
            stats = _stats(path)
            found.append(
                StoredVersion(
                    path=target.relative_to(self.location).as_posix(),
                    committed=path in whole,
                    files=len(stats),
                    bytes=sum(stat.st_size for stat in stats),
                    touched=max((stat.st_mtime for stat in stats), default=0.0),
                )
            )
        return sorted(found, key=lambda location: (location.path, location.committed))

    def _holds(self, path: Path) -> bool:
        """Whether what the path leads to is here: nothing is counted or removed through a link to somewhere else."""
        return path.resolve() == self.location.resolve() / path.relative_to(self.location)

    def update(self, path: str, change: Callable[[bytes | None], bytes | None]) -> None:
        target = self.base / path
        try:
            if change(target.read_bytes() if target.exists() else None) is None:
                return  # without a lock, so that this works in a read-only directory
            with one_at_a_time(target.with_name(f".{target.name}.ferry-lock"), lambda: None):
                changed = change(target.read_bytes() if target.exists() else None)
                if changed is not None:
                    write_atomically(target, changed)
        except OSError as error:
            raise disk_error(error, f"cannot write to {target}") from error


def _stats(directory: Path) -> list[os.stat_result]:
    """Returns the stats of every file in a directory, without those that are removed in the meantime."""
    found = []
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):
            found.append(path.stat())
    return [stat for stat in found if S_ISREG(stat.st_mode)]
