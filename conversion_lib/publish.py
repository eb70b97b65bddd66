"""Out to a directory or to Cloud Storage: whole, checked, and never half seen.

A published checkpoint lies at `URL/<model>/<commit>/<target>/`::

    0/...               the checkpoint as it is: MaxText and Orbax restore from `0/items`
    hf/...              config, tokenizer and generation files of the source
    report/...          what `ferry check` wrote
    provenance.json     where it comes from and how it was checked
    manifest.json       every file with its size and CRC32C
    ferry_commit.json   the marker: there when everything else is, and what readers look for

and `URL/<model>/latest.json` names the last one published.
"""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
from pydantic import BaseModel, ConfigDict, ValidationError

from conversion_lib import __version__
from conversion_lib.destinations import open_destination
from conversion_lib.destinations.base import MANIFEST_NAME, MARKER_NAME, Destination, Item, Manifest
from conversion_lib.errors import BadInput
from conversion_lib.files import in_parallel
from conversion_lib.manifest import (
    FileEntry,
    build_manifest,
    checkpoint_manifest,
    digest_of,
    encode_crc32c,
)
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.record import (
    CHECK_NAME,
    COMMIT_NAME,
    HF_DIR_NAME,
    PROVENANCE_NAME,
    REPORT_DIR_NAME,
    REPORT_PAGE_NAME,
    CheckpointRecord,
    checkpoint_root,
    read_record,
)

REPORT_FILES = (CHECK_NAME, REPORT_PAGE_NAME)
"""What is published of a report's directory: a person may keep other things there."""
LATEST_NAME = "latest.json"
THREADS = 8


class Marker(BaseModel):
    """`ferry_commit.json`. `manifest_crc32c` is of manifest.json's bytes; `published` is UTC in ISO 8601."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    checked: bool
    manifest_crc32c: str
    published: str
    ferry: str


class Latest(BaseModel):
    """`latest.json` of a model. `location` is relative to the file's directory: `<commit>/<target>`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    location: str
    digest: str
    checked: bool
    published: str


class Verdict(BaseModel):
    """The part of `ferry check`'s check.json that goes along with a published checkpoint."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    verdict: str
    digest: str
    max_kl: float | None = None
    threshold: float | None = None
    reference: str | None = None
    mean_kl: float | None = None
    max_abs_diff: float | None = None
    top1: float | None = None
    top10: float | None = None


@dataclass(frozen=True, slots=True)
class PublishResult:
    """`url` is the full location, `marker` the file in it that readers look for.

    bytes: of all files; bytes_copied: of those that this call brought, 0 where the checkpoint was there already.
    """

    url: str
    marker: str
    digest: str
    checked: bool
    files: int
    bytes: int
    bytes_copied: int
    seconds: float


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """`problems` has one line for each file that is missing, extra or different; none: the location is whole."""

    url: str
    digest: str
    files: int
    bytes: int
    problems: list[str]


def publish(
    checkpoint: Path,
    url: str,
    *,
    report: Path | None = None,
    unchecked: bool = False,
    reporter: Reporter = SILENT,
    threads: int = THREADS,
) -> PublishResult:
    """Publishes the checkpoint at DST, DST/0 or DST/0/items under `url`, a directory or gs://bucket/prefix.

    report: the directory that `ferry check` wrote to, DST/report by default. unchecked: publish without a passing
    verdict, and say so in the manifest. Where the same checkpoint is published already nothing is done; where an
    earlier try stopped, this one goes on.

    Raises BadInput for a checkpoint without a record, without a passing verdict on exactly these bytes, and for a
    location that holds something else, or this very checkpoint published unchecked where it has a verdict now;
    OutsideFailure where the disk or the service fails.
    """
    started = time.monotonic()
    root = checkpoint_root(checkpoint)
    record = read_record(root)
    if record is None:
        raise BadInput(f"{root} has no ferry.json: publish takes what `ferry convert` wrote")
    place = f"{_commit(record)}/{record.target.slug}"
    destination = open_destination(url, f"{record.model_name}/{place}")
    step = checkpoint_manifest(root, reporter=reporter, task=f"reading {root}")
    digest = digest_of(step)
    report = report or root / REPORT_DIR_NAME
    verdict = read_verdict(report)
    if not unchecked:
        require_pass(verdict, digest, root, report)
    if verdict is not None and verdict.digest != digest:
        verdict = None  # of another checkpoint: not for this one's readers
    items = _items(root, step, record, verdict, report, checked=not unchecked)
    manifest = Manifest(digest=digest, checked=not unchecked, ferry=__version__, files=[i.entry for i in items])
    copied = 0
    if (marker := _published(destination, digest, checked=not unchecked)) is None:
        with destination.exclusive(reporter):
            if (
                marker := _published(destination, digest, checked=not unchecked)
            ) is None:  # not finished by another run meanwhile
                copied, marker = _deliver(destination, manifest, items, reporter, threads)
                reporter.say(f"published at {destination.url}")
    else:
        reporter.say(f"{digest} is already published at {destination.url}")
    destination.update(f"{record.model_name}/{LATEST_NAME}", lambda old: _newer(old, place, marker))
    return PublishResult(
        url=destination.url,
        marker=f"{destination.url}/{MARKER_NAME}",
        digest=digest,
        checked=marker.checked,
        files=len(items),
        bytes=sum(item.entry.size for item in items),
        bytes_copied=copied,
        seconds=time.monotonic() - started,
    )


def read_verdict(report: Path) -> Verdict | None:
    """The verdict in a report's directory; None where there is none. Raises BadInput for another kind of file."""
    path = report / CHECK_NAME
    try:
        return Verdict.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"{path} is no verdict: {'.'.join(map(str, first['loc']))} {first['msg']}") from error


def require_pass(verdict: Verdict | None, digest: str, root: Path, report: Path) -> None:
    """Raises BadInput unless `verdict` is a pass on the checkpoint with this digest."""
    advice = f"run `ferry check {root} --reference HF_DIR`, or publish with --unchecked"
    if verdict is None:
        raise BadInput(f"{root} has not been checked (no {report / CHECK_NAME}): {advice}")
    if verdict.digest != digest:
        raise BadInput(
            f"{report / CHECK_NAME} is about another checkpoint ({verdict.digest}, this is {digest}): {advice}"
        )
    if verdict.verdict != "pass":
        kl = "" if verdict.max_kl is None else f", max KL {verdict.max_kl:.3g}"
        raise BadInput(f"{root} did not pass its check (verdict {verdict.verdict}{kl}): {advice}")


def verify(url: str, *, reporter: Reporter = SILENT) -> VerifyResult:
    """Checks a published location, `URL/<model>/<commit>/<target>`, against its manifest.

    A directory is read in full; in Cloud Storage the sizes and CRC32C that the service keeps are compared. Raises
    BadInput where no checkpoint is published there.
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
    if marker.manifest_crc32c != _entry(MANIFEST_NAME, manifest_content or b"").crc32c:
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
    extra = there.keys() - {entry.path for entry in expected}
    return problems + [f"{path}: not in the manifest" for path in sorted(extra) if path.startswith("0/")]


def _under_step(entries: Iterable[FileEntry]) -> list[FileEntry]:
    """The checkpoint's own files, relative to `0/`."""
    return [e.model_copy(update={"path": e.path[2:]}) for e in entries if e.path.startswith("0/")]


def _commit(record: CheckpointRecord) -> str:
    """The second level of a published path; weights without a commit go by the fingerprint of their conversion."""
    return record.origin.commit or f"local-{record.fingerprint.removeprefix('sha256:')[:12]}"


def _items(
    root: Path,
    step: list[FileEntry],
    record: CheckpointRecord,
    verdict: Verdict | None,
    report: Path,
    *,
    checked: bool,
) -> list[Item]:
    """Every file to publish but the manifest and the marker."""
    items = [_item("0", root / "0", entry) for entry in step]
    if (root / HF_DIR_NAME).is_dir():
        items += [_item(HF_DIR_NAME, root / HF_DIR_NAME, entry) for entry in build_manifest(root / HF_DIR_NAME)]
    for name in REPORT_FILES if verdict is not None else ():
        if (report / name).is_file():
            items.append(_item(REPORT_DIR_NAME, report, _entry(name, (report / name).read_bytes())))
    provenance: dict[str, Any] = {
        "record": record.model_dump(mode="json"),
        "checked": checked,
        "verdict": json.loads(verdict.model_dump_json()) if verdict else None,
        "ferry": __version__,
    }
    content = json.dumps(provenance, indent=2).encode() + b"\n"
    return [*items, Item(_entry(PROVENANCE_NAME, content), content)]


def _item(name: str, folder: Path, entry: FileEntry) -> Item:
    return Item(entry.model_copy(update={"path": f"{name}/{entry.path}"}), folder / entry.path)


def _entry(path: str, content: bytes) -> FileEntry:
    return FileEntry(path=path, size=len(content), crc32c=encode_crc32c(google_crc32c.Checksum(content)))


def _published(destination: Destination, digest: str, *, checked: bool) -> Marker | None:
    """The marker of what is published there; None where nothing is. Raises BadInput for another checkpoint."""
    content = destination.read(MARKER_NAME)
    if content is None:
        return None
    try:
        marker = Marker.model_validate_json(content)
    except ValidationError as error:
        raise BadInput(f"{destination.url}/{MARKER_NAME} is no marker of this version") from error
    if marker.digest != digest:
        raise BadInput(
            f"{destination.url} holds {marker.digest}, and this checkpoint is {digest}: publish to another URL, or"
            " remove that one first"
        )
    if checked and not marker.checked:
        raise BadInput(
            f"{destination.url} was published without a check: remove it and publish again, to have the verdict with it"
        )
    return marker


def _deliver(
    destination: Destination, manifest: Manifest, items: list[Item], reporter: Reporter, threads: int
) -> tuple[int, Marker]:
    """Brings what is missing and commits; the bytes brought, and the marker."""
    kept = destination.begin(manifest)
    missing = [item for item in items if item.entry.path not in kept]
    size = sum(item.entry.size for item in missing)
    with reporter.task(f"publishing to {destination.url}", size) as progress:

        def put(item: Item, stopped: threading.Event) -> None:
            destination.put(item, progress.advance, stopped)

        # an Orbax reader takes a checkpoint for whole when this one is there
        last = f"0/{COMMIT_NAME}"
        in_parallel(put, [item for item in missing if item.entry.path != last], threads=threads)
        in_parallel(put, [item for item in missing if item.entry.path == last], threads=1)
    content = manifest.model_dump_json(indent=1).encode() + b"\n"
    marker = Marker(
        digest=manifest.digest,
        checked=manifest.checked,
        manifest_crc32c=_entry(MANIFEST_NAME, content).crc32c,
        published=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        ferry=__version__,
    )
    destination.commit(content, marker.model_dump_json(indent=1).encode() + b"\n")
    return size, marker


def _newer(old: bytes | None, place: str, marker: Marker) -> bytes | None:
    """What latest.json is to be; None where it names this location already, or one published later."""
    latest = Latest(location=place, digest=marker.digest, checked=marker.checked, published=marker.published)
    try:
        named = Latest.model_validate_json(old or b"")
    except ValidationError:
        named = None
    if named is not None and named.published >= latest.published:
        return None
    return latest.model_dump_json(indent=1).encode() + b"\n"
