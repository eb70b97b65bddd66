"""Publishers that are killed, and several of them at the same place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.publish.destinations import cloud_storage
from conversion_lib.publish.publish import PublishResult, publish
from conversion_lib.publish.verify import verify
from conversion_lib.storage import lease
from conversion_lib.storage.locations import location
from tests.support.fakes.cloud_storage import FakeCloudStorage, Fault
from tests.support.published_checkpoints import LATEST, PLACE, STEP, make_checkpoint, names, read, write_verdict


def killed_publisher(checkpoint: Path, url: str, at: str) -> None:
    """A publisher in its own process that kills itself when it comes to the file `at`."""
    code = f"""
import os, pathlib, signal
from conversion_lib.publish import publish
from conversion_lib.publish.destinations import base
original = base.Item.open
def dies(item):
    if item.entry.path == {at!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(item)
base.Item.open = dies
publish.publish(pathlib.Path({str(checkpoint)!r}), {url!r}, threads=1)
"""
    process = subprocess.run([sys.executable, "-c", code], env=os.environ.copy(), capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


def test_killed_and_run_again(checkpoint: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRED_SECONDS", 0.5)
    location = f"{url}/{PLACE}"
    killed_publisher(checkpoint, url, "hf/config.json")
    assert read(location, "ferry_commit.json") is None
    assert read(location, "0/commit_success.txt") is None
    result = publish(checkpoint, url)
    large = len(STEP["0/items/d/large"])
    assert result.bytes_copied <= result.bytes - large
    assert verify(result.url).problems == []
    assert not [name for name in names(url) if "ferry-" in name]


def test_killed_and_then_something_else(
    checkpoint: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "EXPIRED_SECONDS", 0.5)
    killed_publisher(checkpoint, url, "hf/config.json")
    other = make_checkpoint(tmp_path / "other", salt=b"other")
    (other / "0" / "items" / "d" / "large").write_bytes(b"small")
    (other / "0" / "items" / "d" / "empty").unlink()
    write_verdict(other)
    result = publish(other, url)
    assert verify(result.url).problems == []
    assert read(result.url, "0/items/d/large") == b"small"
    assert "0/items/d/empty" not in names(result.url)


@pytest.mark.parametrize(
    ("name", "skip"),
    [
        ("d/large", 1),  # in the middle of an upload
        ("manifest.json", 1),  # when all the rest is there
        ("ferry_commit.json", 0),
        ("latest-*", 0),
    ],
)
def test_killed_at_any_request(
    checkpoint: Path, fake: FakeCloudStorage, monkeypatch: pytest.MonkeyPatch, name: str, skip: int
) -> None:
    monkeypatch.setattr(lease, "EXPIRED_SECONDS", 0.5)
    fake.faults = [Fault(what="reset", name=f"*{name}", method="P*", skip=skip, seconds=1.0)]
    code = f"import pathlib; from conversion_lib.publish import publish; publish.publish({str(checkpoint)!r}, 'gs://bucket')"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        while fake.faults[0].times:
            assert process.poll() is None, "ended before the request came"
            time.sleep(0.01)
        process.kill()
    published = read(f"gs://bucket/{PLACE}", "ferry_commit.json") is not None
    assert published == (name == "latest-*")
    assert verify(publish(checkpoint, "gs://bucket").url).problems == []
    assert json.loads(read("gs://bucket", LATEST) or b"")["location"] == PLACE.partition("/")[2]
    assert not [name for name in names("gs://bucket") if "ferry_lease" in name]


def at_once(*runs: Callable[[], PublishResult]) -> tuple[list[PublishResult], list[Exception]]:
    results: list[PublishResult] = []
    failures: list[Exception] = []

    def attempt(run: Callable[[], PublishResult]) -> None:
        try:
            results.append(run())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=attempt, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, failures


def test_two_at_once(checkpoint: Path, url: str) -> None:
    results, failures = at_once(*[lambda: publish(checkpoint, url)] * 3)
    assert not failures
    assert sorted(result.bytes_copied > 0 for result in results) == [False, False, True]
    assert verify(results[0].url).problems == []
    assert not [name for name in names(url) if "lease" in name]


def test_two_different_ones_at_once_do_not_mix(checkpoint: Path, url: str, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", salt=b"other")
    (other / "0" / "items" / "_METADATA").write_bytes(b"[1]")
    write_verdict(other)
    results, failures = at_once(lambda: publish(checkpoint, url), lambda: publish(other, url))
    assert len(results) == len(failures) == 1
    assert isinstance(failures[0], BadInput) and f"holds {results[0].digest}" in str(failures[0])
    verified = verify(results[0].url)
    assert (verified.problems, verified.digest) == ([], results[0].digest)


def test_a_lease_in_a_bucket_that_is_taken_over(
    checkpoint: Path, fake: FakeCloudStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped so long that another took its lease over writes no marker."""
    original = cloud_storage.CloudStorageDestination.commit

    def late(self: cloud_storage.CloudStorageDestination, manifest: bytes, marker: bytes) -> None:
        fake.put("bucket", f"{PLACE}/.ferry_lease.json", b"another run")
        original(self, manifest, marker)

    monkeypatch.setattr(cloud_storage.CloudStorageDestination, "commit", late)
    with pytest.raises(OutsideFailure, match=r"another run took over gs://bucket/.*"):
        publish(checkpoint, "gs://bucket")
    assert read(f"gs://bucket/{PLACE}", "ferry_commit.json") is None
    assert read(f"gs://bucket/{PLACE}", ".ferry_lease.json") == b"another run"


def test_different_commits_at_once_and_the_pointer(url: str, tmp_path: Path) -> None:
    made = [make_checkpoint(tmp_path / f"made-{i}", commit=str(i) * 40, salt=bytes([i])) for i in range(4)]
    results, failures = at_once(*[lambda root=root: publish(root, url) for root in made])
    assert not failures
    newest = max(results, key=lambda result: json.loads(read(result.url, "ferry_commit.json") or b"")["published"])
    assert json.loads(read(url, LATEST) or b"")["digest"] == newest.digest
    assert [problem for result in results for problem in verify(result.url).problems] == []


def test_a_heartbeat_whose_answer_is_lost_loses_no_lease(fake: FakeCloudStorage) -> None:
    held = location("gs://bucket/lease").lease()
    assert held.acquire()
    fake.faults = [Fault(503, "POST", "lease", applied=True)]
    held.heartbeat()
    assert fake.faults[0].times == 0 and not held.lost.is_set()
    fake.put("bucket", "lease", b"another run's")
    held.heartbeat()
    assert held.lost.is_set()
