"""A run whose output is a prefix in a bucket."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conversion_lib.cloud.place import CloudPlace
from conversion_lib.command import run_command
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.on_the_fly import ensure_checkpoint
from conversion_lib.outputs import BucketClaim
from conversion_lib.progress import SILENT
from conversion_lib.to_maxtext import run
from tests.checkpoints import QWEN3, random_tensors, write_checkpoint
from tests.fakes.cloud_storage import FakeCloudStorage
from tests.sparse_checkpoints import llama_tensors

OUTPUT = "gs://bucket/runs/base"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny", QWEN3, random_tensors(llama_tensors(QWEN3)))


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCloudStorage]:
    with FakeCloudStorage(["bucket"]) as fake:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", fake.endpoint)
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", fake.endpoint)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        yield fake


def ensure(source: Path, **settings: Any) -> Path | str:
    return ensure_checkpoint(source, OUTPUT, reporter=SILENT, **settings)


def test_it_is_converted_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (CloudPlace.parse(OUTPUT) / "run1/checkpoints/100").write(b"the run's own")
    pathways = {"checkpoint_storage_use_ocdbt": False, "checkpoint_storage_use_zarr3": False}
    assert ensure(source, **pathways) == f"{OUTPUT}/0/items"
    place = CloudPlace.parse(OUTPUT)
    assert place.children() == {"0", "ferry.json", "hf", "run1"}, "claims are given back"
    said = json.loads((place / "0/items/_METADATA").read() or b"")
    assert (said["use_ocdbt"], said["use_zarr3"]) == (False, False)
    monkeypatch.setattr("sys.executable", "/no/python")
    assert ensure(source, **pathways) == f"{OUTPUT}/0/items"
    with pytest.raises(BadInput, match=r"checkpoint_storage_use_ocdbt: False there, True here; .*zarr3: False there"):
        ensure(source)
    (place / "ferry.json").remove([""])
    with pytest.raises(BadInput, match="scan_layers: True there, False here"):
        ensure(source, scan_layers=False, **pathways)


def test_who_holds_the_claim_is_waited_for(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (BucketClaim(CloudPlace.parse(OUTPUT) / ".ferry_on_the_fly.json") for _ in range(2))
    assert first.take() and not second.take()
    with pytest.raises(OutsideFailure, match=f"{OUTPUT}/0/items was not committed within 0 s"):
        ensure(source, wait_seconds=0.2)
    first.release()
    assert second.take()
    second.release()


def test_a_claim_that_stands_still_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversion_lib.outputs.STALE_SECONDS", 0.2)
    place = CloudPlace.parse(OUTPUT) / ".ferry_on_the_fly.json"
    place.write(b'{"run": "of a machine that is gone", "beats": 7}')
    claim = BucketClaim(place)
    assert not claim.take()
    time.sleep(0.3)
    assert claim.take()
    claim.release()


def test_the_drop_in_writes_to_a_bucket(source: Path) -> None:
    words = ["model_name=qwen3-0.6b", f"base_output_directory={OUTPUT}", f"hf_model_path={source}"]
    assert run_command(lambda reporter: run(words, reporter)) == 0
    assert (CloudPlace.parse(OUTPUT) / "0/commit_success.txt").read() is not None


def test_another_kind_of_url(source: Path) -> None:
    with pytest.raises(BadInput, match="s3://bucket/x: give a directory or gs://bucket/prefix"):
        ensure_checkpoint(source, "s3://bucket/x", reporter=SILENT)
