"""What Ferry noted of a Hugging Face checkpoint in a directory, and whether that still is what was noted.

A record counts by where it lies and by the times of the files that it is about. A repository can bring a record along,
but not the times that its files will have once git, or whatever brought them here, has written them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from conversion_lib.record import DOWNLOAD_RECORD_NAME, HF_RECORD_NAME, HfRecord, Origin, Provenance, parsed

if TYPE_CHECKING:
    from conversion_lib.sources.files import Shard

SECOND = 10**9


def download_record(directory: Path) -> Provenance | None:
    """What `ferry download` left in a directory; None where it left nothing. Raises BadInput where it is damaged."""
    path = directory / DOWNLOAD_RECORD_NAME
    return parsed(Provenance, path.read_bytes(), path, "provenance") if path.is_file() else None


def hf_record(directory: Path) -> HfRecord | None:
    """The same of `ferry dequantize` and `ferry export`."""
    path = directory / HF_RECORD_NAME
    return parsed(HfRecord, path.read_bytes(), path, "checkpoint record") if path.is_file() else None


def modified_times(directory: Path, names: Iterable[str]) -> dict[str, int]:
    """When files were written last, by name, as a record has it."""
    return {name: (directory / name).lstat().st_mtime_ns for name in names}


class Noted:
    """What the records in a directory say of its weight files, as far as they count.

    Raises BadInput where a record is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._name = str(directory)
        self._record, self._download = hf_record(directory), download_record(directory)
        self._hashes = {(file.path, file.size): file.sha256 for file in self._download.files} if self._download else {}

    def content(self, shard: Shard) -> str | None:
        """What is known of a file: the fingerprint of the run that wrote it, or the hash that was verified."""
        if self._record is not None and _is_as_noted(self._record.modified, shard):
            return self._record.fingerprint
        if self._download is not None and _is_as_noted(self._download.modified, shard):
            return self._hashes.get((shard.name, shard.size))
        return None

    def origin(self, shards: Collection[Shard]) -> Origin | None:
        """Where weights in these files came from; None where that is not known."""
        if self._record is not None:
            return self._record.origin if _all(self._record.modified, shards) else None
        if self._download is not None and _all(self._download.modified, shards):
            return Origin(path=self._name, repo=self._download.repo, commit=self._download.commit)
        return None

    def doubts(self, shards: Collection[Shard]) -> list[str]:
        """One line where there is a record that does not count, for a person."""
        if (self._record is None and self._download is None) or self.origin(shards) is not None:
            return []
        name, cure = HF_RECORD_NAME, "write it anew, or copy it with its times (cp -p, rsync -t)"
        if self._record is None and self._download is not None:
            name, cure = DOWNLOAD_RECORD_NAME, f"`ferry download {self._download.repo} {self._name}` checks them again"
        return [
            f"{self._name}: its weights were changed or copied since {name} was written, so what that says of their"
            f" origin does not count; {cure}"
        ]


def _all(noted: Mapping[str, int], shards: Collection[Shard]) -> bool:
    return all(_is_as_noted(noted, shard) for shard in shards)


def _is_as_noted(noted: Mapping[str, int], shard: Shard) -> bool:
    """Whether a file was last written when its record says; what copies it may keep whole seconds only."""
    written = noted.get(shard.name)
    if written is None:
        return False
    return shard.modified in (written, written // SECOND * SECOND)
