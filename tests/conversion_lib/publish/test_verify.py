"""What is published against its manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conversion_lib.errors import BadInput
from conversion_lib.publish.publish import publish
from conversion_lib.publish.verify import verify
from tests.support.fakes.cloud_storage import FakeCloudStorage
from tests.support.published_checkpoints import PLACE, STEP


def test_verify_finds_what_is_wrong(checkpoint: Path, tmp_path: Path) -> None:
    location = Path(publish(checkpoint, str(tmp_path / "out")).url)
    large = location / "0" / "items" / "d" / "large"
    content = bytearray(large.read_bytes())
    content[1_000_000] ^= 1
    large.write_bytes(content)
    (location / "hf" / "config.json").write_bytes(b"{  }")
    (location / "0" / "items" / "manifest.ocdbt").unlink()
    (location / "0" / "items" / "new").write_bytes(b"")
    problems = verify(str(location)).problems
    assert [problem.partition(":")[0] for problem in problems] == [
        "0/items/d/large",
        "0/items/manifest.ocdbt",
        "hf/config.json",
        "0/items/new",
    ]
    assert "crc32c" in problems[0] and "missing" in problems[1]
    assert "4 bytes, the manifest says 2" in problems[2] and "not in the manifest" in problems[3]


def test_verify_finds_a_changed_manifest(checkpoint: Path, tmp_path: Path) -> None:
    location = Path(publish(checkpoint, str(tmp_path / "out")).url)
    manifest = json.loads((location / "manifest.json").read_bytes())
    (location / "manifest.json").write_text(json.dumps({**manifest, "checked": False}))
    assert verify(str(location)).problems == ["manifest.json: not the one that was published"]
    (location / "manifest.json").write_text("{")
    assert verify(str(location)).problems == ["manifest.json: missing or broken"]
    (location / "ferry_commit.json").unlink()
    with pytest.raises(BadInput, match="no published checkpoint at"):
        verify(str(location))


def test_cloud_verify_sees_corruption(checkpoint: Path, fake: FakeCloudStorage) -> None:
    result = publish(checkpoint, "gs://bucket/models")
    name = f"models/{PLACE}/0/items/d/large"
    fake.put("bucket", name, bytes(len(STEP["0/items/d/large"])))
    problems = verify(result.url).problems
    assert len(problems) == 1 and problems[0].startswith("0/items/d/large: crc32c")


def test_cloud_verify_sees_what_was_written_again(checkpoint: Path, fake: FakeCloudStorage) -> None:
    result = publish(checkpoint, "gs://bucket/models")
    fake.put("bucket", f"models/{PLACE}/hf/config.json", b"{}")
    fake.put("bucket", f"models/{PLACE}/hf/more.json", b"{}")
    assert verify(result.url).problems == [
        "hf/config.json: written again, with the same bytes, since it was published",
        "hf/more.json: not in the manifest",
    ]
