"""Uploading an export: the real clients of the Hub and of Cloud Storage, against local servers."""

import json

import pytest

from conversion_lib.core.retry import Backoff
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.progress import SILENT
from conversion_lib.publish import upload as uploading
from conversion_lib.publish.upload import upload
from tests.support.fakes.cloud_storage import FakeCloudStorage
from tests.support.fakes.hub_uploads import UploadHub

TOKEN = "hf_mayWrite"


@pytest.fixture
def export(tmp_path):
    """What `ferry export` leaves, as far as uploading looks at it."""
    path = tmp_path / "export"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return path


def send(path, destination, **options):
    return upload(path, destination, **{"private": True, "message": "m", "reporter": SILENT, **options})


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(uploading, "Backoff", lambda: Backoff(attempts=2, first_seconds=0.01))
    with UploadHub(TOKEN) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.mark.parametrize("private", [True, False])
def test_to_the_hub_in_one_commit(export, hub, private):
    result = send(export, "hf://acme/x", private=private, message="Export of /c")
    repo = hub.repos["acme/x"]
    assert repo["private"] is private
    (commit,) = repo["commits"]
    assert commit["message"] == "Export of /c"
    assert commit["files"] == {path.name: path.read_bytes() for path in export.iterdir()}
    assert (result["url"], result["files"], len(result["commit"])) == ("hf://acme/x", 2, 40)
    send(export, "hf://acme/x")  # into a repository that is there


def test_token_that_may_not_write(export, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(BadInput, match="refuses access") as caught:
        send(export, "hf://acme/x")
    assert "hf_another" not in str(caught.value)


def test_outage_of_the_hub(export, hub):
    hub.unavailable = 1
    assert send(export, "hf://acme/x")["commit"]
    hub.unavailable = 100
    with pytest.raises(OutsideFailure, match="HTTP 503"):
        send(export, "hf://acme/x")


@pytest.fixture
def cloud(monkeypatch):
    with FakeCloudStorage(["bucket"]) as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.endpoint)
        yield running


def test_to_cloud_storage_with_the_config_last(export, cloud):
    from google.cloud import storage

    result = send(export, "gs://bucket/exports/x/")
    blobs = {blob.name: blob for blob in storage.Client().list_blobs("bucket")}
    assert {name: blob.download_as_bytes() for name, blob in blobs.items()} == {
        f"exports/x/{path.name}": path.read_bytes() for path in export.iterdir()
    }
    assert blobs["exports/x/config.json"].generation == max(blob.generation for blob in blobs.values())
    assert result["bytes_out"] == sum(path.stat().st_size for path in export.iterdir())


def test_bucket_that_there_is_not(export, cloud):
    with pytest.raises(BadInput, match="gs://none/x cannot be written"):
        send(export, "gs://none/x")


@pytest.mark.parametrize("destination", ["s3://bucket/x", "ftp://x"])
def test_other_destinations(export, destination):
    with pytest.raises(BadInput, match="expected gs://"):
        send(export, destination)


def test_directory_without_a_checkpoint(tmp_path):
    with pytest.raises(BadInput, match=r"no config\.json"):
        send(tmp_path, "hf://acme/x")
