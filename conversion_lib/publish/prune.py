"""Retention: which published versions are superseded, and what dead publishers left; listed, and removed on demand.

A model and a target have one version for each commit. Kept are the one that the `latest` pointer names, the newest few
and the young. A location that was begun and has had no marker and no write for a day is a leftover.
"""

from __future__ import annotations

import datetime
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

DAY_SECONDS = 86_400.0
Why = Literal["superseded", "leftover"]


@dataclass(frozen=True, slots=True)
class Removable:
    """A location at `path`, <model>/<commit>/<target>. published: UTC in ISO 8601, None for leftovers."""

    path: str
    why: Why
    published: str | None
    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What the policy does not keep under `url`; removed: whether this call removed it. kept: paths of versions."""

    url: str
    removed: bool
    versions: list[Removable]
    kept: list[str]
    bytes: int


@dataclass(frozen=True, slots=True)
class _Version:
    location: StoredVersion
    marker: Marker

    @property
    def published(self) -> float:
        return datetime.datetime.fromisoformat(self.marker.published).timestamp()


def prune(
    url: str,
    *,
    keep: int = 3,
    older_than_days: float = 0.0,
    remove: bool = False,
    reporter: Reporter = SILENT,
) -> PruneResult:
    """Finds, and with `remove` removes, what is superseded under `url`, the base that `publish` was given.

    keep: versions of a model and target that stay, the newest, at least one. older_than_days: younger ones stay, too.
    What a `latest` pointer names always stays, and so does a version whose marker cannot be read.

    Raises BadInput where nothing is published under `url`, OutsideFailure where the disk or the service fails.
    """
    if keep < 1:
        raise BadInput(f"--keep {keep}: the newest version is never removed; give 1 or more")
    base = open_destination(url)
    locations = base.locations()
    if not locations:
        raise BadInput(f"nothing is published under {url}: expected the URL that `ferry publish` was given")
    now = time.time()
    versions = _versions(base, locations, reporter)
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


def _versions(base: Destination, locations: Iterable[StoredVersion], reporter: Reporter) -> list[_Version]:
    """The committed locations, without those whose marker nobody understands."""
    versions = []
    for location in locations:
        if location.committed:
            marker = _marker(base, location)
            if marker is None:
                reporter.say(f"{base.url}/{location.path} stays: its {MARKER_NAME} is none of this version")
                continue
            versions.append(_Version(location, marker))
    return versions


def _marker(base: Destination, location: StoredVersion) -> Marker | None:
    """None where nobody understands it, or it has gone meanwhile. What the service refuses is raised all the same."""
    content = base.read(f"{location.path}/{MARKER_NAME}")
    return None if content is None else parse_marker(content)


def _kept(base: Destination, versions: list[_Version], keep: int, since: float) -> set[str]:
    """The paths of versions that stay: `keep` of each model and target, those since then, and what `latest` names."""
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
    """The path of the location that is `latest` for the model and the target of `path`; empty where none is."""
    return str(read_latest(base, PublishedPath.parse(path)) or "")


def _remove(url: str, removable: Removable, reporter: Reporter) -> None:
    """Removes one location, unless it has changed since it was looked at: published, or named by `latest`."""
    place = open_destination(url, removable.path)
    with place.exclusive(reporter):
        if place.read(MARKER_NAME) is None:
            changed = removable.why == "superseded"
        else:
            changed = removable.why == "leftover" or removable.path == _latest(open_destination(url), removable.path)
        if changed:
            reporter.say(f"{place.url} stays: it is not what it was when it was looked at")
            return
        place.remove()
    reporter.say(f"removed {place.url} ({removable.why}, {format_bytes(removable.bytes)})")
