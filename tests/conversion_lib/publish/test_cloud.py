"""Publishing to Cloud Storage: the real client against the fake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.publish.destinations import cloud_storage, open_destination
from conversion_lib.publish.publish import publish
from conversion_lib.publish.verify import verify
from conversion_lib.storage import gcs_client as client
from tests.support.fakes.cloud_storage import Chance, FakeCloudStorage, Fault
from tests.support.published_checkpoints import LATEST, PLACE, STEP, make_checkpoint, read

LARGE = f"models/{PLACE}/0/items/d/large"


def require_whole(fake: FakeCloudStorage, checkpoint: Path) -> None:
    """Every file of the checkpoint, its marker and its pointer lie in the bucket, and nothing else."""
    local = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    del local["ferry.json"]
    for name, path in local.items():
        assert fake.read("bucket", f"models/{PLACE}/{name}") == path.read_bytes(), name
    written = {"provenance.json", "manifest.json", "ferry_commit.json"}
    assert set(fake.names("bucket")) == {f"models/{PLACE}/{name}" for name in {*local, *written}} | {f"models/{LATEST}"}


def test_order_and_preconditions(checkpoint: Path, fake: FakeCloudStorage) -> None:
    publish(checkpoint, "gs://bucket")
    written = [name.removeprefix(f"{PLACE}/") for name in fake.written()]
    assert written[-4:] == ["0/commit_success.txt", "manifest.json", "ferry_commit.json", LATEST]
    changes = [path for method, path in fake.requests if method in ("POST", "DELETE")]
    assert changes and all("ifGenerationMatch=" in path for path in changes)


def test_the_manifest_has_generations(checkpoint: Path, fake: FakeCloudStorage) -> None:
    result = publish(checkpoint, "gs://bucket/models")
    manifest = json.loads(read(result.url, "manifest.json") or b"")
    for entry in manifest["files"]:
        there = fake.objects["bucket", f"models/{PLACE}/{entry['path']}"]
        assert (entry["generation"], entry["crc32c"]) == (there.generation, there.content.crc32c)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_one_request_in_ten_fails(
    checkpoint: Path, fake: FakeCloudStorage, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud_storage, "UPLOAD_CHUNK_BYTES", 512 << 10)
    fake.chance, fake.write_interval = Chance(0.1, seed), 0.2
    result = publish(checkpoint, "gs://bucket/models")
    assert verify(result.url).problems == []
    require_whole(fake, checkpoint)


def test_outages_at_the_worst_places(checkpoint: Path, fake: FakeCloudStorage) -> None:
    fake.faults = [
        Fault(503, "POST", "*/0/items/_METADATA"),
        Fault(503, "POST", "*/hf/config.json", applied=True),  # written, but the answer is lost
        Fault(503, "POST", "*/ferry_commit.json", applied=True),
        Fault(what="reset", method="POST", name="*/manifest.json", applied=True),
        Fault(503, "PUT", "*/large", applied=True),
        Fault(503, "POST", f"models/{LATEST}", applied=True),
        Fault(503, "DELETE", "*/.ferry_lease.json", applied=True),
    ]
    result = publish(checkpoint, "gs://bucket/models")
    assert all(fault.times == 0 for fault in fake.faults)
    assert verify(result.url).problems == []
    require_whole(fake, checkpoint)


def test_a_broken_upload_goes_on(checkpoint: Path, fake: FakeCloudStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = 1 << 20
    monkeypatch.setattr(cloud_storage, "UPLOAD_CHUNK_BYTES", chunk)
    fake.faults = [Fault(what="reset", method="PUT", name=LARGE, skip=5, after=600_000)]
    publish(checkpoint, "gs://bucket/models")
    sessions = {path for method, path in fake.requests if method == "PUT"}
    sent = [path for method, path in fake.requests if method == "PUT"]
    assert len(sessions) == 1 and len(sent) == -(-len(STEP["0/items/d/large"]) // chunk) + 1
    require_whole(fake, checkpoint)


def test_an_outage_that_does_not_end(checkpoint: Path, fake: FakeCloudStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RETRY", client.RETRY.with_timeout(0.2))
    fake.faults = [Fault(503, "POST", "*/0/items/_METADATA", times=1000)]
    with pytest.raises(OutsideFailure, match="cannot write 0/items/_METADATA in gs://bucket/models/tiny"):
        publish(checkpoint, "gs://bucket/models")
    assert f"models/{PLACE}/ferry_commit.json" not in fake.names("bucket")
    fake.faults = []
    assert verify(publish(checkpoint, "gs://bucket/models").url).problems == []


def test_what_is_there_is_not_sent_again(checkpoint: Path, fake: FakeCloudStorage) -> None:
    fake.faults = [Fault(400, "POST", "*/manifest.json", skip=1)]  # when all has been sent
    with pytest.raises(BadInput, match=r"cannot write manifest\.json"):
        publish(checkpoint, "gs://bucket/models")
    before = fake.objects["bucket", LARGE].generation
    fake.put("bucket", f"models/{PLACE}/hf/config.json", b"[]")
    result = publish(checkpoint, "gs://bucket/models")
    assert fake.objects["bucket", LARGE].generation == before
    assert result.bytes_copied < result.bytes - len(STEP["0/items/d/large"])
    require_whole(fake, checkpoint)


def test_somebody_else_s_objects_stay(checkpoint: Path, fake: FakeCloudStorage) -> None:
    fake.put("bucket", f"models/{PLACE}/mine", b"mine")
    with pytest.raises(BadInput, match=r"holds something that is not a published checkpoint \(mine\)"):
        publish(checkpoint, "gs://bucket/models")
    assert fake.names("bucket") == [f"models/{PLACE}/mine"]


def test_bad_input(checkpoint: Path, fake: FakeCloudStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(url: str, match: str) -> None:
        with pytest.raises(BadInput, match=match):
            publish(checkpoint, url)
        assert fake.names("bucket") == []

    refused("gs://nowhere/models", "no bucket nowhere")
    refused("gs:///models", "expected gs://bucket/prefix")
    refused("gs://-bucket/models", "cannot name a bucket")
    refused("gs://bucket/" + "x" * 1000, "names of up to 1024 bytes")
    fake.denied = {"storage.objects.create"}
    refused("gs://bucket/models", "credentials do not allow it")
    fake.denied = {"storage.objects.list"}
    refused("gs://bucket/models", "credentials do not allow it")
    fake.denied = {"storage.objects.delete"}
    with pytest.raises(BadInput, match=r"cannot list in .*: the credentials do not allow it"):
        publish(checkpoint, "gs://bucket/models")
    assert fake.names("bucket") == [f"models/{PLACE}/.ferry_lease.json"]  # which cannot be given back
    fake.denied = set()
    fake.objects.clear()
    with pytest.raises(BadInput, match="no published checkpoint at"):
        verify("gs://bucket/models")
    with pytest.raises(BadInput, match="no bucket nowhere"):
        verify("gs://nowhere/models")
    fake.token = "secret"
    refused("gs://bucket/models", "no credentials for gs://bucket")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")
    refused("gs://bucket/models", "no credentials for gs://bucket")


def test_a_pointer_is_changed_by_one_at_a_time(fake: FakeCloudStorage) -> None:
    place, seen = open_destination("gs://bucket/models"), []

    def change(old: bytes | None) -> bytes:
        seen.append(old)
        if len(seen) == 1:
            fake.put("bucket", "models/pointer", b"theirs")
        return b"mine after " + (old or b"nothing")

    place.update("pointer", change)
    assert seen == [None, b"theirs"]
    assert fake.read("bucket", "models/pointer") == b"mine after theirs"


def test_a_checkpoint_that_lies_in_cloud_storage(tmp_path: Path, fake: FakeCloudStorage) -> None:
    """It is copied by the service: no byte of the weights comes here."""
    local = make_checkpoint(tmp_path / "local")
    for path in local.rglob("*"):
        if path.is_file():
            fake.put("bucket", f"staging/7/{path.relative_to(local).as_posix()}", path.read_bytes())
    fake.put("bucket", "staging/7/.ferry/journal", b"not to be published")
    fake.rewrite_bytes = 3 << 20
    fake.faults = [Fault(503, "POST", "*/large", skip=3, applied=True)]  # the answer to the last of four calls
    result = publish("gs://bucket/staging/7/0/items", "gs://bucket/models")
    assert result.digest == verify(result.url).digest
    calls = [path for method, path in fake.requests if method == "POST" and "large" in path]
    assert len(calls) == 5 and all("rewriteTo" in path for path in calls)
    assert not [path for _, path in fake.requests if "large" in path and "alt=media" in path]
    for name in [name for name in fake.names("bucket") if name.startswith("staging")]:
        del fake.objects["bucket", name]
    require_whole(fake, local)


def test_out_of_cloud_storage_into_a_directory(tmp_path: Path, fake: FakeCloudStorage) -> None:
    local = make_checkpoint(tmp_path / "local")
    for path in local.rglob("*"):
        if path.is_file():
            fake.put("bucket", f"staging/{path.relative_to(local).as_posix()}", path.read_bytes())
    result = publish("gs://bucket/staging/", str(tmp_path / "out"))
    assert verify(result.url).problems == []
    del fake.objects["bucket", "staging/0/commit_success.txt"]
    with pytest.raises(BadInput, match="gs://bucket/staging/0 is not committed"):
        publish("gs://bucket/staging", str(tmp_path / "other"))
    with pytest.raises(BadInput, match=r"gs://bucket/nothing has no ferry\.json"):
        publish("gs://bucket/nothing", str(tmp_path / "other"))
