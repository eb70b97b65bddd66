"""Manifests: every file of a published checkpoint, and the digest that stands for the checkpoint itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from conversion_lib.storage.checksums import FileEntry


class Manifest(BaseModel):
    """`manifest.json`: every file of a location but itself and the marker.

    digest: the checkpoint's own, of the files under `0/`. checked: whether a passing verdict came with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    digest: str
    checked: bool
    ferry: str
    files: list[FileEntry]

    def to_json(self) -> bytes:
        return self.model_dump_json(indent=1, exclude_none=True).encode() + b"\n"


def digest_of(entries: Iterable[FileEntry]) -> str:
    """The digest of a checkpoint with these files, in whatever order they come."""
    lines = sorted((entry.path, entry.size, entry.crc32c) for entry in entries)
    return "sha256:" + hashlib.sha256(json.dumps(lines).encode()).hexdigest()
