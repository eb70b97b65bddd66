"""Which published versions are kept, and which are removed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.publish import prune as prune_module
from conversion_lib.publish.destinations import open_destination
from conversion_lib.publish.destinations.base import MARKER_NAME, Item
from conversion_lib.publish.prune import prune
from conversion_lib.publish.publish import publish
from conversion_lib.publish.verify import verify
from conversion_lib.record import Target
from tests.support.fakes.cloud_storage import FakeCloudStorage
from tests.support.published_checkpoints import LATEST, PLACE, TARGET, make_checkpoint, names, read

PUBLISHED = [f"tiny/{digit * 40}/{TARGET}" for digit in "12345"]


@pytest.fixture
def versions(url: str, tmp_path: Path) -> str:
    """A base with five versions of one model and target, oldest first, and one of another target."""
    root = tmp_path / "checkpoint"
    for digit in "12345":
        publish(make_checkpoint(root, commit=digit * 40, large=b"1234"), url)
    publish(make_checkpoint(root, commit="1" * 40, target=Target(scan_layers=False), large=b"1234"), url)
    return url


def paths(result: prune_module.PruneResult) -> list[str]:
    return [version.path for version in result.versions]


def point_to(url: str, path: str) -> None:
    """Sets the pointer back, as a person may."""
    pointer = json.loads(read(url, LATEST) or b"") | {"location": path.partition("/")[2]}
    open_destination(url).update(LATEST, lambda old: json.dumps(pointer).encode())


def test_the_newest_stay(versions: str) -> None:
    before = names(versions)
    listed = prune(versions)
    assert (paths(listed), listed.removed) == (PUBLISHED[:2], False)
    assert names(versions) == before
    removed = prune(versions, remove=True)
    assert (paths(removed), removed.removed) == (PUBLISHED[:2], True)
    assert removed.bytes == sum(version.bytes for version in removed.versions) > 1000
    assert names(versions) == [name for name in before if not name.startswith(tuple(PUBLISHED[:2]))]
    assert sorted(removed.kept) == sorted([*PUBLISHED[2:], f"tiny/{'1' * 40}/un{TARGET}"])
    for path in removed.kept:
        assert verify(f"{versions}/{path}").problems == []
    again = prune(versions, remove=True)
    assert (paths(again), again.bytes) == ([], 0)


def test_what_latest_names_stays(versions: str) -> None:
    point_to(versions, PUBLISHED[0])
    assert paths(prune(versions, keep=1)) == PUBLISHED[1:4]


def test_young_ones_stay(versions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert paths(prune(versions, keep=1, older_than_days=1)) == []
    now = time.time() + 3 * prune_module.DAY_SECONDS
    monkeypatch.setattr(prune_module.time, "time", lambda: now)
    assert paths(prune(versions, keep=1, older_than_days=2)) == PUBLISHED[:4]
    assert paths(prune(versions, keep=1, older_than_days=4)) == []


def test_a_marker_that_nobody_understands_stays(url: str, tmp_path: Path) -> None:
    for digit in "12":
        publish(make_checkpoint(tmp_path / "checkpoint", commit=digit * 40), url)
    open_destination(url).update(f"{PUBLISHED[0]}/{MARKER_NAME}", lambda old: b"{}")
    result = prune(url, keep=1, remove=True)
    assert (paths(result), result.kept) == ([], PUBLISHED[:2])


@pytest.mark.parametrize("published", ["soon", "10000-01-01T00:00:00+00:00", "2026-01-01T00:00:00", "", 5, None, []])
def test_a_marker_with_no_time(url: str, checkpoint: Path, published: Any) -> None:
    publish(checkpoint, url)
    marker = f"{PLACE}/{MARKER_NAME}"
    content = json.loads(read(url, marker) or b"") | {"published": published}
    open_destination(url).update(marker, lambda old: json.dumps(content).encode())
    assert prune(url).kept == [PLACE]
    with pytest.raises(BadInput, match=f"{MARKER_NAME} is not a marker of this version: published: "):
        publish(checkpoint, url)


def test_a_version_that_a_link_leads_to(checkpoint: Path, tmp_path: Path) -> None:
    """What lies somewhere else is not this base's to remove."""
    for digit in "12":
        publish(make_checkpoint(checkpoint, commit=digit * 40), str(tmp_path / "theirs"))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "tiny").symlink_to(tmp_path / "theirs" / "tiny")
    with pytest.raises(BadInput, match="nothing is published under"):
        prune(str(tmp_path / "ours"), keep=1, remove=True)
    assert len(prune(str(tmp_path / "theirs")).kept) == 2


def test_bad_input(url: str, checkpoint: Path) -> None:
    with pytest.raises(BadInput, match="nothing is published under"):
        prune(url)
    publish(checkpoint, url)
    with pytest.raises(BadInput, match="--keep 0"):
        prune(url, keep=0)
    open_destination(url).update(LATEST, lambda old: b"{}")
    with pytest.raises(BadInput, match=f"{LATEST} is not a pointer of this version"):
        prune(url)


def test_leftovers(url: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(item: Item) -> Any:
        if item.entry.path == "hf/config.json":
            raise OutsideFailure("the network went away")
        return original(item)

    original = Item.open
    monkeypatch.setattr(Item, "open", breaks)
    with pytest.raises(OutsideFailure):
        publish(checkpoint, url)
    monkeypatch.setattr(Item, "open", original)
    begun = names(url)
    assert begun and paths(prune(url, remove=True)) == []
    now = time.time() + 2 * prune_module.DAY_SECONDS
    monkeypatch.setattr(prune_module.time, "time", lambda: now)
    found = prune(url, remove=True).versions
    assert [(version.why, version.published) for version in found] == [("leftover", None)]
    assert names(url) == []


def test_a_removal_that_was_killed(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = Path(publish(checkpoint, str(tmp_path / "out")).url)
    location.rename(location.with_name(f".{location.name}.ferry-partial"))
    now = time.time() + 2 * prune_module.DAY_SECONDS
    monkeypatch.setattr(prune_module.time, "time", lambda: now)
    result = prune(str(tmp_path / "out"), remove=True)
    assert ([version.why for version in result.versions], result.kept) == (["leftover"], [])
    assert names(str(tmp_path / "out")) == [LATEST]


@pytest.mark.parametrize("url", ["gs"], indirect=True)
def test_a_version_goes_marker_first(versions: str, fake: FakeCloudStorage) -> None:
    begun = len(fake.requests)
    prune(versions, keep=4, remove=True)
    deleted = [path for method, path in fake.requests[begun:] if method == "DELETE"]
    assert "ferry_commit.json" in deleted[0] and "commit_success.txt" in deleted[1]
    assert "manifest.json" in deleted[-2] and ".ferry_lease.json" in deleted[-1]
    assert all("ifGenerationMatch=" in path for path in deleted)


@pytest.mark.skipif(os.getuid() == 0, reason="root removes everywhere")
def test_without_permission(checkpoint: Path, tmp_path: Path) -> None:
    for digit in "12":
        publish(make_checkpoint(checkpoint, commit=digit * 40), str(tmp_path / "out"))
    (tmp_path / "out" / "tiny" / ("1" * 40)).chmod(0o500)
    with pytest.raises(BadInput, match="Permission denied"):
        prune(str(tmp_path / "out"), keep=1, remove=True)
