"""Manifests: every file of a published checkpoint, and the digest that identifies the checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from conversion_lib.storage.checksums import FileEntry


class Manifest(BaseModel):
    """`manifest.json`: every file of a location except the manifest and the marker.

    Attributes:
        format: Version of this layout.
        digest: `sha256:<hex>` of the files under `0/`.
        checked: Whether it was published with a passing verdict.
        ferry: Ferry's version.
        files: Paths are relative to the location.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    digest: str
    checked: bool
    ferry: str
    files: list[FileEntry]

    def to_json(self) -> bytes:
        """Returns the content of manifest.json."""
        return self.model_dump_json(indent=1, exclude_none=True).encode() + b"\n"


def digest_of(entries: Iterable[FileEntry]) -> str:
    """Returns the digest, `sha256:<hex>`, of a checkpoint with these files, in any order.

    It covers path, size and CRC32C. Paths are relative to `0/`.
    """
    lines = sorted((entry.path, entry.size, entry.crc32c) for entry in entries)
    return "sha256:" + hashlib.sha256(json.dumps(lines).encode()).hexdigest()
