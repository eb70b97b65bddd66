"""Publishes a checkpoint to a directory or to Cloud Storage: checked, and visible only when it is complete.

A published checkpoint is at `URL/<model>/<commit>/<target>/`::

    0/...               the checkpoint itself: MaxText and Orbax restore from `0/items`
    maxtext_settings.yml    what a MaxText run takes in place of base.yml; models/ belongs with it
    hf/...              config, tokenizer and generation files of the source
    report/...          written by `ferry check`
    provenance.json     where it comes from and how it was checked
    manifest.json       every file with its size and CRC32C, in Cloud Storage also its generation
    ferry_commit.json   the marker, which is written last and which readers look for

`URL/<model>/latest-<target>.json` names the commit published last for a target.
"""

from __future__ import annotations

import datetime
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from conversion_lib import __version__
from conversion_lib.errors import BadInput
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.publish.destinations import open_destination
from conversion_lib.publish.destinations.base import MANIFEST_NAME, MARKER_NAME, Destination, Item
from conversion_lib.publish.location import Latest, Marker, PublishedPath, read_marker
from conversion_lib.publish.manifest import Manifest, digest_of
from conversion_lib.publish.staged import FOLDERS, Staged, open_staged, sha256_of
from conversion_lib.publish.verdict import Verdict, changed_since, parse_verdict, require_pass
from conversion_lib.record import (
    CHECK_NAME,
    COMMIT_NAME,
    MAXTEXT_SETTINGS_NAME,
    PROVENANCE_NAME,
    RECORD_NAME,
    REPORT_DIR_NAME,
    REPORT_PAGE_NAME,
    STEP_NAME,
    CheckpointRecord,
    parsed,
    record_in,
    seconds_of,
)
from conversion_lib.storage.checksums import FileEntry, crc32c_of
from conversion_lib.storage.files import in_parallel
from conversion_lib.storage.locations import location

REPORT_FILES = (CHECK_NAME, REPORT_PAGE_NAME)
"""The files of a report's directory that are published: users may keep other files there."""
THREADS = 8


@dataclass(frozen=True, slots=True)
class PublishResult:
    """The result of a publish.

    Attributes:
        url: The full location.
        marker: The URL of the file that readers look for.
        digest: The checkpoint's, `sha256:<hex>`.
        checked: Whether it was published with a passing verdict.
        files: Number of files.
        bytes: Their total size.
        bytes_copied: Size of the files that this call copied. 0: the checkpoint was there already.
        seconds: Wall time.
    """

    url: str
    marker: str
    digest: str
    checked: bool
    files: int
    bytes: int
    bytes_copied: int
    seconds: float


def publish(
    checkpoint: str | Path,
    url: str,
    *,
    report: Path | None = None,
    unchecked: bool = False,
    reporter: Reporter = SILENT,
    threads: int = THREADS,
) -> PublishResult:
    """Publishes a checked checkpoint at `url`/<model>/<commit>/<target>/.

    Resumes an interrupted publish, and copies nothing if the same checkpoint is published already.

    Args:
        checkpoint: DST, DST/0 or DST/0/items: a path or gs://bucket/prefix. Objects in Cloud Storage are copied by the
            service.
        url: A directory or gs://bucket/prefix.
        report: The directory that `ferry check` wrote. None: DST/report.
        unchecked: Publish without a passing verdict. The manifest says so.
        reporter: Shows progress and messages.
        threads: How many files are copied at once.

    Raises:
        BadInput: The checkpoint has no record, or no passing verdict for exactly these bytes. Or the location holds
            something else, or the same checkpoint without a check.
        OutsideFailure: The disk or the service failed.
    """
    started = time.monotonic()
    staged = open_staged(checkpoint)
    record = _read_record(staged)
    path = PublishedPath.of_record(record)
    destination = open_destination(url, str(path))
    step = staged.step(reporter)
    digest = digest_of(step)
    report_url, files = _read_report(staged, report)
    verdict = parse_verdict(files.get(CHECK_NAME), f"{report_url}/{CHECK_NAME}")
    companions = staged.companions() | _covered_report(files)
    if not unchecked:
        require_pass(verdict, digest, companions, str(staged), f"{report_url}/{CHECK_NAME}")
    if verdict is not None and (verdict.digest != digest or changed_since(verdict, companions)):
        verdict = None  # it is about something else
    items = [staged.item("0", entry) for entry in step]
    for folder in FOLDERS:
        items += [staged.item(folder, entry) for entry in staged.folder(folder)]
    if (settings := staged.read(MAXTEXT_SETTINGS_NAME)) is not None:
        items.append(_item(MAXTEXT_SETTINGS_NAME, settings))
    items += [_item(f"{REPORT_DIR_NAME}/{name}", content) for name, content in files.items() if verdict]
    items.append(_item(PROVENANCE_NAME, _provenance(record, verdict, checked=not unchecked)))
    manifest = Manifest(digest=digest, checked=not unchecked, ferry=__version__, files=[i.entry for i in items])
    copied, fresh = 0, False
    if (marker := _published(destination, manifest)) is None:
        with destination.exclusive(reporter):
            if (marker := _published(destination, manifest)) is None:  # not finished by another run in the meantime
                line = verdict.model.line if verdict and verdict.model else record.maxtext_differs
                copied, marker = _deliver(destination, manifest, items, line, reporter, threads)
                reporter.say(f"published at {destination.url}")
                fresh = True
    else:
        reporter.say(f"{digest} is already published at {destination.url}")
    _point(destination, path, marker, fresh, reporter)
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


def _read_record(staged: Staged) -> CheckpointRecord:
    record = record_in(lambda name: staged.read(name) if name == RECORD_NAME else None, str(staged))
    if record is None:
        raise BadInput(f"{staged} has no {RECORD_NAME}: give a checkpoint that `ferry convert` wrote")
    return record


def _read_report(staged: Staged, report: Path | None) -> tuple[str, dict[str, bytes]]:
    """Returns the report's directory, by default the one beside the checkpoint, and its files by name."""
    read = staged.read if report is None else Staged(location(report.absolute().parent)).read
    where = f"{staged}/{REPORT_DIR_NAME}" if report is None else str(report)
    folder = REPORT_DIR_NAME if report is None else report.absolute().name
    found = {name: read(f"{folder}/{name}") for name in REPORT_FILES}
    return where, {name: content for name, content in found.items() if content is not None}


def _covered_report(files: dict[str, bytes]) -> dict[str, str]:
    page = files.get(REPORT_PAGE_NAME)
    return {} if page is None else {f"{REPORT_DIR_NAME}/{REPORT_PAGE_NAME}": sha256_of(page)}


def _provenance(record: CheckpointRecord, verdict: Verdict | None, *, checked: bool) -> bytes:
    provenance: dict[str, Any] = {
        "record": record.model_dump(mode="json"),
        "checked": checked,
        "verdict": json.loads(verdict.model_dump_json()) if verdict else None,
        "ferry": __version__,
    }
    return json.dumps(provenance, indent=2).encode() + b"\n"


def _item(path: str, content: bytes) -> Item:
    return Item(FileEntry(path=path, size=len(content), crc32c=crc32c_of(content)), content)


def _published(destination: Destination, manifest: Manifest) -> Marker | None:
    """Returns the marker of the published checkpoint; None if there is none.

    Raises BadInput for another checkpoint, and for this one with other files beside it.
    """
    marker = read_marker(destination)
    if marker is None:
        return None
    if marker.digest != manifest.digest:
        raise BadInput(
            f"{destination.url} holds {marker.digest}, and this checkpoint is {manifest.digest}: publish to another"
            " URL, or remove that one first"
        )
    there = parsed(Manifest, destination.read(MANIFEST_NAME) or b"", f"{destination.url}/{MANIFEST_NAME}", "manifest")
    if other := sorted(path for path, _, _ in _companions(there) ^ _companions(manifest)):
        raise BadInput(
            f"{destination.url} holds this checkpoint with another {other[0]}: publish to another URL, or remove that"
            " one first"
        )
    if manifest.checked and not marker.checked:
        raise BadInput(
            f"{destination.url} was published without a check: remove it and publish again to include the verdict"
        )
    return marker


def _companions(manifest: Manifest) -> set[tuple[str, int, str]]:
    """Returns the files that readers use beside the weights. Report and provenance may differ: they have times."""
    return {
        (file.path, file.size, file.crc32c)
        for file in manifest.files
        if not file.path.startswith((f"{STEP_NAME}/", f"{REPORT_DIR_NAME}/")) and file.path != PROVENANCE_NAME
    }


def _deliver(
    destination: Destination, manifest: Manifest, items: list[Item], model: str, reporter: Reporter, threads: int
) -> tuple[int, Marker]:
    """Copies what is missing and commits. Returns the bytes copied and the marker. model: as in `Marker`."""
    there = destination.begin(manifest)
    missing = [item for item in items if item.entry.path not in there]
    size = sum(item.entry.size for item in missing)
    with reporter.task(f"publishing to {destination.url}", size) as progress:

        def put(item: Item, stopped: threading.Event) -> None:
            there[item.entry.path] = destination.put(item, progress.advance, stopped)

        # an Orbax reader takes the checkpoint for complete when this file is there
        last = f"0/{COMMIT_NAME}"
        in_parallel(put, [item for item in missing if item.entry.path != last], threads=threads)
        in_parallel(put, [item for item in missing if item.entry.path == last], threads=1)
    content = manifest.model_copy(update={"files": [there[item.entry.path] for item in items]}).to_json()
    marker = Marker(
        digest=manifest.digest,
        checked=manifest.checked,
        manifest_crc32c=crc32c_of(content),
        published=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        ferry=__version__,
        model=model,
    )
    destination.commit(content, marker.model_dump_json(indent=1).encode() + b"\n")
    return size, marker


def _point(destination: Destination, path: PublishedPath, marker: Marker, fresh: bool, reporter: Reporter) -> None:
    """Lets the pointer name what was published last.

    If `fresh`, this run has just published it: then it is the last one, unless another run has published something
    since. A time in the future shows that a clock is wrong, and says nothing about the order.
    """
    doubts: list[str] = []
    latest = Latest(location=path.below_model, digest=marker.digest, checked=marker.checked, published=marker.published)

    def change(old: bytes | None) -> bytes | None:
        doubts.clear()
        try:
            named = Latest.model_validate_json(old or b"")
        except ValidationError:
            named = None
        if named is not None:
            later = max((named, latest), key=lambda one: seconds_of(one.published))
            ahead = seconds_of(later.published) > time.time() and named.location != latest.location
            stays = not fresh if ahead else seconds_of(named.published) >= seconds_of(latest.published)
            if ahead:
                doubts.append(_doubt(path, later, named if stays else latest))
            if stays:
                return None
        return latest.model_dump_json(indent=1).encode() + b"\n"

    destination.update(path.pointer, change)
    for doubt in doubts:
        reporter.say(doubt)


def _doubt(path: PublishedPath, ahead: Latest, named: Latest) -> str:
    return (
        f"{path.model}/{ahead.location} was published at {ahead.published}, by a clock ahead of this machine's. So it"
        f" cannot be told what was published last: {path.pointer} names {named.location}. To have it name another,"
        " remove it and publish that again"
    )
