"""Compares a published checkpoint with its manifest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import ValidationError

from conversion_lib.errors import BadInput
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.publish.destinations import open_destination
from conversion_lib.publish.destinations.base import MANIFEST_NAME, MARKER_NAME, OWN_NAMES
from conversion_lib.publish.location import Marker
from conversion_lib.publish.manifest import Manifest, digest_of
from conversion_lib.storage.checksums import FileEntry, crc32c_of


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The result of a verification.

    Attributes:
        url: The location.
        digest: Of the files that are there, `sha256:<hex>`. Empty: marker or manifest cannot be read.
        files: Number of files that are there.
        bytes: Their total size.
        problems: One line for each file that is missing, extra or different. Empty: the checkpoint is complete.
    """

    url: str
    digest: str
    files: int
    bytes: int
    problems: list[str]


def verify(url: str, *, reporter: Reporter = SILENT) -> VerifyResult:
    """Compares a published checkpoint with its manifest.

    In a directory, all files are read. In Cloud Storage, the sizes, CRC32Cs and generations that the service keeps are
    compared.

    Args:
        url: URL/<model>/<commit>/<target>.
        reporter: Shows progress.

    Raises:
        BadInput: No checkpoint is published there.
        OutsideFailure: The disk or the service failed.
    """
    destination = open_destination(url)
    content = destination.read(MARKER_NAME)
    if content is None:
        raise BadInput(f"no published checkpoint at {url} (no {MARKER_NAME}): expected URL/<model>/<commit>/<target>")
    there = {entry.path: entry for entry in destination.entries(reporter)}
    manifest_content = destination.read(MANIFEST_NAME)
    problems: list[str] = []
    try:
        marker = Marker.model_validate_json(content)
        manifest = Manifest.model_validate_json(manifest_content or b"")
    except ValidationError as error:
        broken = f"{MARKER_NAME if error.title == 'Marker' else MANIFEST_NAME}: missing or broken"
        return VerifyResult(url, "", len(there), sum(e.size for e in there.values()), [broken])
    if marker.manifest_crc32c != crc32c_of(manifest_content or b""):
        problems.append(f"{MANIFEST_NAME}: not the one that was published")
    problems += _differences(manifest.files, there)
    digest = digest_of(_under_step(there.values()))
    if not problems and not digest == manifest.digest == marker.digest:
        problems.append(f"digest: {digest}, but the manifest says {manifest.digest} and the marker {marker.digest}")
    return VerifyResult(url, digest, len(there), sum(entry.size for entry in there.values()), problems)


def _differences(expected: list[FileEntry], there: dict[str, FileEntry]) -> list[str]:
    problems = []
    for entry in expected:
        found = there.get(entry.path)
        if found is None:
            problems.append(f"{entry.path}: missing")
        elif found.size != entry.size:
            problems.append(f"{entry.path}: {found.size} bytes, the manifest says {entry.size}")
        elif found.crc32c != entry.crc32c:
            problems.append(f"{entry.path}: crc32c {found.crc32c or 'unknown'}, the manifest says {entry.crc32c}")
        elif entry.generation not in (None, found.generation):
            problems.append(f"{entry.path}: written again, with the same bytes, since it was published")
    extra = there.keys() - {entry.path for entry in expected} - OWN_NAMES
    return problems + [f"{path}: not in the manifest" for path in sorted(extra)]


def _under_step(entries: Iterable[FileEntry]) -> list[FileEntry]:
    """The checkpoint's own files, relative to `0/`."""
    return [e.model_copy(update={"path": e.path[2:]}) for e in entries if e.path.startswith("0/")]
