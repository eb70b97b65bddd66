"""What a path or a URL names."""

from __future__ import annotations

from pathlib import Path

import pytest

from conversion_lib.errors import BadInput
from conversion_lib.storage.gcs import BucketLocation
from conversion_lib.storage.local import LocalLocation
from conversion_lib.storage.locations import local_path, location


def test_a_path_names_a_directory(tmp_path: Path) -> None:
    assert location(tmp_path) == location(str(tmp_path)) == LocalLocation(tmp_path)


def test_a_url_names_a_prefix_in_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")  # no credentials; nothing is asked
    found = location("gs://bucket/some/prefix/")
    assert isinstance(found, BucketLocation)
    assert str(found) == "gs://bucket/some/prefix"


URLS = [
    *("s3://bucket/prefix", "hf://org/name", "file:///directory", "https://host/path", "az://container/path", "gs://"),
    *("s3:/bucket/prefix", "gs:/bucket/prefix", "hf:/org/name", "x:/directory", "file:/directory"),
    *("GS://bucket/prefix", "Gs://bucket/prefix", "GS:/bucket", "S3://bucket", "gs:bucket/prefix", "s3:bucket"),
]


@pytest.mark.parametrize("url", URLS)
def test_another_url_is_refused(url: str) -> None:
    """Also one that lost a slash when it was taken for a path, and would be a directory named `s3:`."""
    for where in (url, Path(url)):
        with pytest.raises(BadInput, match=r"expected .*gs://bucket/prefix"):
            location(where)
        with pytest.raises(BadInput, match="expected a file"):
            local_path(where, "a file")


def test_a_bucket_that_is_written_otherwise_is_told_how() -> None:
    for url in ("GS://bucket", "gs:/bucket", "gs:bucket"):
        with pytest.raises(BadInput, match=f"^{url}: .*write buckets as gs://, in small letters and"):
            location(url)


@pytest.mark.parametrize(
    "path", ["a:b", "./s3:/a", "/s3:/a", "a/s3:b", "12:30/run", "runs/2024-01-01T10:00:00", "gs", "s3/x", ".", "~/x"]
)
def test_other_names_with_colons_are_paths(path: str) -> None:
    assert location(path).local == local_path(path) == Path(path)


@pytest.mark.parametrize("bucket", ["bk", "Bucket", "-bucket", "bucket-", "buck et", "büchse", "x" * 300])
def test_a_name_that_no_bucket_can_have_is_refused(bucket: str) -> None:
    with pytest.raises(BadInput, match="cannot name a bucket"):
        location(f"gs://{bucket}/prefix")
