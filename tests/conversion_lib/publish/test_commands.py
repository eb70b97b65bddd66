"""`ferry publish`, `verify` and `prune`, from their arguments to their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conversion_lib.storage import gcs_client as client
from tests.support.checkpoints import ferry_here
from tests.support.fakes.cloud_storage import FakeCloudStorage, Fault
from tests.support.published_checkpoints import PLACE, TARGET, make_checkpoint


def test_publish_verify_prune(checkpoint: Path, url: str) -> None:
    published = ferry_here("publish", checkpoint, url, "--json")
    assert published.returncode == 0, published.stderr
    location = json.loads(published.stdout)["url"]
    assert json.loads(ferry_here("publish", checkpoint, url, "--json").stdout)["bytes_copied"] == 0
    verified = ferry_here("verify", location, "--json")
    assert (verified.returncode, json.loads(verified.stdout)["problems"]) == (0, [])

    make_checkpoint(checkpoint, commit="f" * 40)
    assert ferry_here("publish", checkpoint, url).returncode == 0
    listed = ferry_here("prune", url, "--keep", "1")
    assert listed.returncode == 0 and f"{PLACE}  superseded" in listed.stdout and "with --yes" in listed.stdout
    assert ferry_here("verify", location).returncode == 0
    removed = json.loads(ferry_here("prune", url, "--keep", "1", "--yes", "--json").stdout)
    assert (removed["removed"], [version["path"] for version in removed["versions"]]) == (True, [PLACE])
    assert removed["kept"] == [f"tiny/{'f' * 40}/{TARGET}"]
    gone = ferry_here("verify", location)
    assert gone.returncode == 2 and "no published checkpoint at" in gone.stderr


def test_verify_fails_with_one(checkpoint: Path, fake: FakeCloudStorage) -> None:
    assert ferry_here("publish", checkpoint, "gs://bucket/models").returncode == 0
    fake.put("bucket", f"models/{PLACE}/0/items/_METADATA", b"[]")
    failed = ferry_here("verify", f"gs://bucket/models/{PLACE}")
    assert failed.returncode == 1
    assert "does not match its manifest: 0/items/_METADATA: crc32c" in failed.stderr


@pytest.mark.parametrize(
    ("url", "denied", "said"),
    [
        ("gs://nowhere/models", "", "no bucket nowhere"),
        ("gs://bucket/models", "storage.objects.create", "the credentials do not allow it"),
        ("gs://-/models", "", "cannot name a bucket"),
        ("gs://bucket/a\nb", "", "Cloud Storage does not allow an object named"),
        ("ftp://bucket/models", "", "expected gs://bucket/prefix, a directory or file:///directory"),
        ("/sys/models", "", "cannot write to /sys/models"),
    ],
)
def test_bad_input_is_one_line_and_two(
    checkpoint: Path, fake: FakeCloudStorage, url: str, denied: str, said: str
) -> None:
    fake.denied = {denied}
    refused = ferry_here("publish", checkpoint, url)
    assert refused.returncode == 2 and said in refused.stderr
    assert len([line for line in refused.stderr.splitlines() if line.startswith("ferry: ")]) == 1
    assert fake.names("bucket") == []


def test_an_outage_is_three(checkpoint: Path, fake: FakeCloudStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RETRY", client.RETRY.with_timeout(0.1))
    fake.faults = [Fault(503, times=10_000)]
    failed = ferry_here("publish", checkpoint, "gs://bucket/models")
    assert failed.returncode == 3 and "in gs://bucket/models/tiny" in failed.stderr
    assert "HTTP 503 at every try" in failed.stderr
