"""A checkpoint to publish, and where to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from conversion_lib.storage import gcs_client as client
from conversion_lib.storage import lease
from tests.support.fakes.cloud_storage import FakeCloudStorage
from tests.support.published_checkpoints import make_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCloudStorage]:
    """Cloud Storage with one bucket; waits are as short as a test wants them. No publisher is thought dead."""
    with FakeCloudStorage(["bucket"]) as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.endpoint)
        monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.1)
        monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)
        monkeypatch.setattr(client, "RETRY", client.RETRY.with_delay(initial=0.01, maximum=0.1))
        yield running


@pytest.fixture(params=["directory", "file", "gs"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "gs":
        request.getfixturevalue("fake")
        return "gs://bucket/models"
    return f"file://{tmp_path}/out" if request.param == "file" else str(tmp_path / "out")
