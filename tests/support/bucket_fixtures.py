"""A checkpoint, its conversion, and the Cloud Storage of `tests/support/fakes`, with short waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from conversion_lib.conversions.convert import convert
from conversion_lib.record import Target
from conversion_lib.storage import gcs, lease
from conversion_lib.storage import gcs_client as client
from tests.support.buckets import WHOLE
from tests.support.checkpoints import QWEN3, random_tensors, write_checkpoint
from tests.support.fakes.cloud_storage import FakeCloudStorage
from tests.support.sparse_checkpoints import llama_tensors

QUICK_RETRIES = {"gcs_request_retries": {"max_retries": 40, "initial_delay": "5ms", "max_delay": "50ms"}}


@pytest.fixture(scope="package")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    write_checkpoint(directory, QWEN3, random_tensors(llama_tensors(QWEN3)), shards=3)
    (directory / "tokenizer.json").write_text('{"made": "up"}')
    return directory


@pytest.fixture(scope="package")
def beside(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same conversion in a directory."""
    directory = tmp_path_factory.mktemp("beside") / "qwen"
    convert(source, directory, Target(), options=WHOLE)
    return directory


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCloudStorage]:
    with FakeCloudStorage(["bucket"]) as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.endpoint)
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", running.endpoint)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.5)
        monkeypatch.setattr(lease, "EXPIRED_SECONDS", 3.0)
        monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)
        monkeypatch.setattr(client, "RETRY", client.RETRY.with_delay(initial=0.01, maximum=0.1))
        monkeypatch.setattr(gcs, "TENSORSTORE_REQUESTS", gcs.TENSORSTORE_REQUESTS | QUICK_RETRIES)
        yield running
