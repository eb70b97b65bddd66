"""What a path or a URL names."""

from __future__ import annotations

from pathlib import Path

import pytest

from conversion_lib.errors import BadInput
from conversion_lib.storage.gcs import BucketLocation
from conversion_lib.storage.local import LocalLocation
from conversion_lib.storage.locations import location


def test_a_path_names_a_directory(tmp_path: Path) -> None:
    assert location(tmp_path) == location(str(tmp_path)) == LocalLocation(tmp_path)


def test_a_url_names_a_prefix_in_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")  # no credentials; nothing is asked
    found = location("gs://bucket/some/prefix/")
    assert isinstance(found, BucketLocation)
    assert str(found) == "gs://bucket/some/prefix"


@pytest.mark.parametrize("url", ["s3://bucket/prefix", "hf://org/name", "file:///directory", "gs://"])
def test_another_scheme_is_refused(url: str) -> None:
    with pytest.raises(BadInput, match=r"expected .*bucket/prefix"):
        location(url)


@pytest.mark.parametrize("bucket", ["bk", "Bucket", "-bucket", "bucket-", "buck et", "büchse", "x" * 300])
def test_a_name_that_no_bucket_can_have_is_refused(bucket: str) -> None:
    with pytest.raises(BadInput, match="cannot name a bucket"):
        location(f"gs://{bucket}/prefix")
