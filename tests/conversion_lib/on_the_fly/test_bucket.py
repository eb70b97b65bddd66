"""A run whose output is a prefix in a bucket."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conversion_lib import to_huggingface, to_maxtext
from conversion_lib.conversions.convert import convert
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.on_the_fly import ensure_checkpoint
from conversion_lib.on_the_fly.output import Output
from conversion_lib.program import run_command
from conversion_lib.progress import SILENT
from conversion_lib.record import ON_THE_FLY_LEASE, Target
from conversion_lib.storage.gcs import BucketLocation
from conversion_lib.storage.lease import Lease
from tests.support.checkpoints import QWEN3, WRITTEN, ferry_here, random_tensors, write_checkpoint
from tests.support.fakes.cloud_storage import FakeCloudStorage
from tests.support.sparse_checkpoints import llama_tensors

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
    (BucketLocation.parse(OUTPUT) / "run1/checkpoints/100").write(b"the run's own")
    pathways = {"checkpoint_storage_use_ocdbt": False, "checkpoint_storage_use_zarr3": False}
    assert ensure(source, **pathways) == f"{OUTPUT}/0/items"
    place = BucketLocation.parse(OUTPUT)
    assert place.children() == {"0", "ferry.json", "hf", "run1"}, "leases are given back"
    said = json.loads((place / "0/items/_METADATA").read() or b"")
    assert (said["use_ocdbt"], said["use_zarr3"]) == (False, False)
    monkeypatch.setattr("sys.executable", "/no/python")
    assert ensure(source, **pathways) == f"{OUTPUT}/0/items"
    with pytest.raises(BadInput, match=r"checkpoint_storage_use_ocdbt: False there, True here; .*zarr3: False there"):
        ensure(source)
    place.remove(["ferry.json"])
    with pytest.raises(BadInput, match="scan_layers: True there, False here"):
        ensure(source, scan_layers=False, **pathways)


def leases(count: int) -> list[Lease]:
    return [Output(OUTPUT).lease(lambda: None) for _ in range(count)]


def test_who_holds_the_lease_is_waited_for(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = leases(2)
    assert first.acquire() and not second.acquire()
    with pytest.raises(OutsideFailure, match=f"{OUTPUT}/0/items was not committed within 0 s; process .* holds"):
        ensure(source, wait_seconds=0.2)
    first.release()
    assert second.acquire()
    second.release()


def test_a_lease_that_has_expired_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversion_lib.storage.lease.EXPIRED_SECONDS", 0.2)
    (BucketLocation.parse(OUTPUT) / ON_THE_FLY_LEASE).write(b'{"run": "of a machine that is gone", "beats": 7}')
    (lease,) = leases(1)
    assert not lease.acquire()
    time.sleep(0.3)
    assert lease.acquire()
    lease.release()


def test_a_failure_is_told_to_those_that_wait(source: Path) -> None:
    """Until somebody tries again, and without being in the way of a conversion by hand."""
    failing, waiting = leases(2)
    assert failing.acquire()
    failing.release(failure="the disk was full")
    note = waiting.read()
    assert note is not None and (note.failure, note.failure_is_final) == ("the disk was full", False)
    with pytest.raises(OutsideFailure, match=r"within 0 s; process .* failed: the disk was full"):
        ensure(source, may_convert=False, wait_seconds=0.1)
    convert(source, OUTPUT, Target())
    assert waiting.acquire()
    note = waiting.read()
    assert note is not None and note.failure is None
    waiting.release()
    assert BucketLocation.parse(OUTPUT).children() == set(WRITTEN)


def test_bad_input_is_told_at_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that only waits hears of it from the one that converts."""
    monkeypatch.setattr("conversion_lib.on_the_fly.ensuring.POLL_SECONDS", 0.02)
    (converting,) = leases(1)
    assert converting.acquire()
    threading.Timer(0.2, lambda: converting.release(failure="the repository is gated", final=True)).start()
    with pytest.raises(BadInput, match=r"process .* could not convert: the repository is gated"):
        ensure(source, may_convert=False, wait_seconds=60)


def test_the_drop_ins_write_to_a_bucket_and_read_from_it(source: Path, tmp_path: Path) -> None:
    words = ["model_name=qwen3-0.6b", f"base_output_directory={OUTPUT}", f"hf_model_path={source}"]
    assert run_command(lambda reporter: to_maxtext.run(words, reporter)) == 0
    assert (BucketLocation.parse(OUTPUT) / "0/commit_success.txt").read() is not None
    words = [words[0], f"load_parameters_path={OUTPUT}/0/items", f"base_output_directory={tmp_path / 'back'}"]
    assert run_command(lambda reporter: to_huggingface.run([*words, "weight_dtype=bfloat16"], reporter)) == 0
    assert ferry_here("compare", source, tmp_path / "back").returncode == 0


def test_another_kind_of_url(source: Path) -> None:
    with pytest.raises(BadInput, match="s3://bucket/x: expected a directory or gs://bucket/prefix"):
        ensure_checkpoint(source, "s3://bucket/x", reporter=SILENT)
