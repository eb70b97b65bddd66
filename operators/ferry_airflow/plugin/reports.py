"""The report of a run: of what it published, or, before that and after a failed check, what the check left."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

import google_crc32c
from pydantic import ValidationError

from conversion_lib.errors import FerryError
from conversion_lib.publish.destinations import open_destination
from conversion_lib.publish.destinations.base import LEVELS, MANIFEST_NAME, MARKER_NAME
from conversion_lib.publish.location import Marker
from conversion_lib.publish.manifest import Manifest
from conversion_lib.record import REPORT_DIR_NAME, REPORT_PAGE_NAME
from conversion_lib.storage.checksums import encode_crc32c
from conversion_lib.storage.locations import location
from ferry_airflow.layout import run_report
from ferry_airflow.plugin.runs import Run
from ferry_airflow.scheduling.catalog import DESTINATION_VARIABLE

REPORT = f"{REPORT_DIR_NAME}/{REPORT_PAGE_NAME}"
LARGEST_BYTES = 32 << 20


class NoReport(Exception):
    """There is no report to show. The text says why, for a person."""


def read_report(run: Run) -> bytes:
    """Reads the check's report as the run published it, or else as the check left it under the run's destination.

    A published report must be three levels under the destination that the run was started with. The marker and the
    manifest there must belong together, and the manifest must list the report with its size and CRC32C. So a person who
    can change a task's XCom cannot make the page show another file.

    Returns:
        The HTML page.

    Raises:
        NoReport: Neither is there, the location is wrong or cannot be read, or the report is missing, changed or
            larger than 32 MiB.
    """
    url = published_url(run)
    root = run.conf.get("destination") or os.environ.get(DESTINATION_VARIABLE)
    if not url:
        return _left_by_check(root, run)
    if not isinstance(root, str) or not _lies_under(url, root):
        raise NoReport(f"{url} is not under the destination of this run")
    try:
        published = open_destination(url)
        marker, manifest = published.read(MARKER_NAME), published.read(MANIFEST_NAME)
        if marker is None or manifest is None:
            raise NoReport(f"the API server finds no checkpoint at {url}: it was removed, or is not mounted there")
        entry = _entry(marker, manifest)
        content = published.read(REPORT)
    except FerryError as error:
        raise NoReport(str(error)) from error
    except ValidationError as error:
        raise NoReport(f"{url} has no marker and manifest of this version") from error
    if entry is None:
        raise NoReport(f"the checkpoint at {url} was published without a report")
    if content is None or (len(content), _crc32c(content)) != entry:
        raise NoReport(f"the report at {url} is not the one that was published")
    return content


def _left_by_check(root: object, run: Run) -> bytes:
    """The page that the check left. Its place follows from the run: no XCom is asked."""
    if run.manifest("check") is None:
        raise NoReport("no check has ended in this run: there is no report yet")
    if not isinstance(root, str):
        raise NoReport("this run has no destination: the report is where the stages run")
    url = run_report(root, run.dag_id, run.run_id)
    try:
        content = location(url).read()
    except (FerryError, OSError) as error:
        raise NoReport(f"{url}: {error}") from error
    if content is None:
        raise NoReport(f"the API server finds no report at {url}: the check left none, or it is not mounted there")
    if len(content) > LARGEST_BYTES:
        raise NoReport(f"the report has {len(content)} bytes; this page shows at most {LARGEST_BYTES}")
    return content


def published_url(run: Run) -> str:
    """Returns where the run published its checkpoint or found it already published; empty if neither."""
    published, resolved = run.manifest("publish") or {}, run.manifest("resolve") or {}
    return str(published.get("url") or resolved.get("published") or "")


def _entry(marker: bytes, manifest: bytes) -> tuple[int, str] | None:
    """Size and CRC32C of the report in the manifest, which the marker vouches for; None if it lists no report."""
    if Marker.model_validate_json(marker).manifest_crc32c != _crc32c(manifest):
        raise NoReport("the manifest is not the one that was published")
    files = {file.path: file for file in Manifest.model_validate_json(manifest).files}
    if (file := files.get(REPORT)) is None:
        return None
    if file.size > LARGEST_BYTES:
        raise NoReport(f"the report has {file.size} bytes; this page shows at most {LARGEST_BYTES}")
    return file.size, file.crc32c


def _lies_under(url: str, root: str) -> bool:
    """Whether a location is `<root>/<model>/<commit>/<target>`, with symbolic links resolved."""
    inside, outside = _parts(url), _parts(root)
    return inside[: len(outside)] == outside and len(inside) == len(outside) + LEVELS and ".." not in inside


def _parts(location: str) -> list[str]:
    scheme, separator, rest = location.partition("://")
    if separator and scheme != "file":
        return [scheme, *(part for part in rest.split("/") if part)]
    path = unquote(urlsplit(location).path) if separator else location
    return list(Path(path).resolve().parts)


def _crc32c(content: bytes) -> str:
    return encode_crc32c(google_crc32c.Checksum(content))
