"""Retention: lists superseded versions and leftovers of failed publishes, and removes them on demand.

A model and target have one version for each commit. The one that the `latest` pointer names, the newest few and recent
ones are kept. A location without a marker and without a write for a day is a leftover.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from conversion_lib.errors import BadInput
from conversion_lib.progress import SILENT, Reporter, format_bytes
from conversion_lib.publish.destinations import open_destination
from conversion_lib.publish.destinations.base import MARKER_NAME, Destination, StoredVersion
from conversion_lib.publish.location import Marker, PublishedPath, parse_marker, read_latest
from conversion_lib.record import seconds_of

DAY_SECONDS = 86_400.0
Why = Literal["superseded", "leftover"]


@dataclass(frozen=True, slots=True)
class Removable:
    """A location that the policy does not keep.

    Attributes:
        path: <model>/<commit>/<target>.
        why: `superseded` for a published version, `leftover` for a location that was never committed.
        published: UTC in ISO 8601. None: a leftover.
        files: Number of files.
        bytes: Their total size.
    """

    path: str
    why: Why
    published: str | None
    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class PruneResult:
    """The result of a pruning.

    Attributes:
        url: The base.
        removed: Whether this call was to remove `versions`, or only to list them.
        versions: What the policy does not keep.
        kept: Paths of versions that stay.
        bytes: Total size of `versions`.
    """

    url: str
    removed: bool
    versions: list[Removable]
    kept: list[str]
    bytes: int


@dataclass(frozen=True, slots=True)
class _Version:
    """published: in seconds since 1970."""

    location: StoredVersion
    marker: Marker
    published: float


def prune(
    url: str,
    *,
    keep: int = 3,
    older_than_days: float = 0.0,
    remove: bool = False,
    reporter: Reporter = SILENT,
) -> PruneResult:
    """Lists what is superseded or left over under a base, and removes it with `remove`.

    A version that a `latest` pointer names always stays, and so does one whose marker cannot be read.

    Args:
        url: The base, which was given to `publish`.
        keep: How many of the newest versions of each model and target stay. At least 1.
        older_than_days: Versions published within this many days stay too.
        remove: Whether to remove.
        reporter: Told what is removed, and what stays for an unexpected reason.

    Raises:
        BadInput: Nothing is published under `url`, or `keep` is below 1.
        OutsideFailure: The disk or the service failed.
    """
    if keep < 1:
        raise BadInput(f"--keep {keep}: the newest version is never removed; give 1 or more")
    base = open_destination(url)
    locations = base.locations()
    if not locations:
        raise BadInput(f"nothing is published under {url}: expected the URL that `ferry publish` was given")
    now = time.time()
    versions = _versions(base, locations, now, reporter)
    kept = _kept(base, versions, keep, now - older_than_days * DAY_SECONDS)
    found = [
        Removable(v.location.path, "superseded", v.marker.published, v.location.files, v.location.bytes)
        for v in versions
        if v.location.path not in kept
    ]
    found += [
        Removable(location.path, "leftover", None, location.files, location.bytes)
        for location in locations
        if not location.committed and location.touched < now - DAY_SECONDS
    ]
    if remove:
        for removable in found:
            _remove(url, removable, reporter)
    committed = {location.path for location in locations if location.committed}
    stay = sorted(committed - {removable.path for removable in found if removable.why == "superseded"})
    return PruneResult(url, remove, found, stay, sum(removable.bytes for removable in found))


def _versions(base: Destination, locations: Iterable[StoredVersion], now: float, reporter: Reporter) -> list[_Version]:
    """Returns the committed locations whose marker can be read.

    If a version was published in the future, by a clock that is ahead, the times of its files count instead.
    """
    versions = []
    for location in locations:
        if location.committed:
            marker = _marker(base, location)
            if marker is None:
                reporter.say(f"{base.url}/{location.path} stays: its {MARKER_NAME} is not of this version")
                continue
            published = seconds_of(marker.published)
            if published > now:
                published = min(published, location.touched)
                reporter.say(
                    f"{base.url}/{location.path} was published at {marker.published}, by a clock ahead of this"
                    " machine's: it counts as of when its files were written"
                )
            versions.append(_Version(location, marker, published))
    return versions


def _marker(base: Destination, location: StoredVersion) -> Marker | None:
    """Reads the marker; None if it is of another version or gone by now. Other errors are raised."""
    content = base.read(f"{location.path}/{MARKER_NAME}")
    return None if content is None else parse_marker(content)


def _kept(base: Destination, versions: list[_Version], keep: int, since: float) -> set[str]:
    """Returns the paths of versions that stay: the newest `keep`, those published since then, and the `latest` ones."""
    grouped: dict[str, list[_Version]] = defaultdict(list)
    for version in versions:
        grouped[PublishedPath.parse(version.location.path).pointer].append(version)
    kept = {version.location.path for version in versions if version.published >= since}
    for group in grouped.values():
        newest = sorted(group, key=lambda version: version.published, reverse=True)
        kept |= {version.location.path for version in newest[:keep]}
        kept.add(_latest(base, group[0].location.path))
    return kept


def _latest(base: Destination, path: str) -> str:
    """Returns the path of the `latest` location for the model and target of `path`; empty if there is none."""
    return str(read_latest(base, PublishedPath.parse(path)) or "")


def _remove(url: str, removable: Removable, reporter: Reporter) -> None:
    """Removes one location, unless it has been published, or named by `latest`, since it was listed."""
    place = open_destination(url, removable.path)
    with place.exclusive(reporter):
        if place.read(MARKER_NAME) is None:
            changed = removable.why == "superseded"
        else:
            changed = removable.why == "leftover" or removable.path == _latest(open_destination(url), removable.path)
        if changed:
            reporter.say(f"{place.url} stays: it has changed since it was listed")
            return
        place.remove()
    reporter.say(f"removed {place.url} ({removable.why}, {format_bytes(removable.bytes)})")
