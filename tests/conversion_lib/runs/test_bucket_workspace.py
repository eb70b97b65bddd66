"""Conversions to gs:// with the real clients and the Cloud Storage of the tests: bits, order, kills, faults."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conversion_lib.conversions.convert import convert
from conversion_lib.conversions.finalize import finalize
from conversion_lib.conversions.runner import ConvertResult
from conversion_lib.demo.local_hub import LocalHub
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.plan.parts import Part
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.record import Target
from conversion_lib.runs.options import Options
from conversion_lib.runs.trees import maxtext_staging
from conversion_lib.runs.workspace import exclusively
from conversion_lib.storage import lease as claim
from tests.support.buckets import ROOT, STORAGES, URL, WHOLE, assert_the_same, names
from tests.support.checkpoints import ferry_here
from tests.support.fakes.cloud_storage import Chance, FakeCloudStorage, Fault


def to_cloud(
    source: Path,
    target: Target = Target(),
    *,
    part: str | None = None,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> ConvertResult:
    options = Options(WHOLE.memory_budget, WHOLE.threads, overwrite, part=Part.parse(part) if part else None)
    return convert(source, URL, target, options=options, reporter=reporter)


@pytest.mark.parametrize("target", STORAGES, ids=lambda target: target.slug)
def test_the_bits_of_a_conversion_to_a_directory(
    fake: FakeCloudStorage, source: Path, beside: Path, tmp_path: Path, target: Target
) -> None:
    result = to_cloud(source, target)
    assert (result.path, result.already) == (URL, False)
    assert_the_same(fake, beside, tmp_path)
    requests = len(fake.requests)
    assert to_cloud(source, target).already
    assert not any(method != "GET" for method, _ in fake.requests[requests:])


def test_what_readers_look_for_comes_last(fake: FakeCloudStorage, source: Path) -> None:
    to_cloud(source)
    order = [name.removeprefix(ROOT) for name in fake.written()]
    last = ["0/items/_METADATA", "0/_CHECKPOINT_METADATA", "0/items/commit_success.txt", "0/commit_success.txt"]
    assert order[-4:] == last
    assert order[-5] == "0/items/manifest.ocdbt"
    fake.requests.clear()
    assert not to_cloud(source, overwrite=True).already
    changes = [path for method, path in fake.requests if method == "DELETE" and ".ferry" not in path]
    assert "0%2Fcommit_success.txt" in changes[0] and "items%2Fcommit_success.txt" in changes[1]


def test_one_commit_a_second_is_kept_to(
    fake: FakeCloudStorage, source: Path, beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.write_interval = 0.3
    monkeypatch.setattr(claim, "HEARTBEAT_SECONDS", 0.5)
    to_cloud(source)
    assert_the_same(fake, beside, tmp_path)


@pytest.mark.parametrize("target", [STORAGES[0], STORAGES[3]], ids=lambda target: target.slug)
def test_one_request_in_ten_failing(
    fake: FakeCloudStorage, source: Path, beside: Path, tmp_path: Path, target: Target
) -> None:
    fake.chance = Chance(0.1, seed=7)
    for _ in range(5):
        try:
            to_cloud(source, target)
            break
        except OutsideFailure:
            continue  # as an Airflow task would
    fake.chance = None
    assert to_cloud(source, target).already
    assert_the_same(fake, beside, tmp_path)


def test_parts_and_finalize(fake: FakeCloudStorage, source: Path, beside: Path, tmp_path: Path) -> None:
    to_cloud(source, part="0/3")
    with pytest.raises(BadInput, match="part 1/3 has not been started"):
        finalize(URL)
    with pytest.raises(BadInput, match="holds an unfinished run in 3 parts, and this one is of the whole"):
        to_cloud(source)
    to_cloud(source, part="2/3")
    to_cloud(source, part="1/3")
    assert to_cloud(source, part="1/3").already
    assert "0/commit_success.txt" not in names(fake)
    assert finalize(URL).chunks > 3
    assert finalize(URL).already
    assert_the_same(fake, beside, tmp_path)


KILLED = """
import sys
from pathlib import Path
from conversion_lib.engine import executor as engine
from conversion_lib.conversions.convert import convert
from conversion_lib.runs.options import Options
from conversion_lib.record import Target
engine.GROUP_SECONDS = 0.0
convert(Path(sys.argv[1]), sys.argv[2], Target(), options=Options(64 << 20, 2))
"""


@pytest.mark.parametrize("moment", ["*journal-0/00000003.json", "*items/manifest.ocdbt", "*0/commit_success.txt"])
def test_a_killed_run_is_gone_on_with(
    fake: FakeCloudStorage, source: Path, beside: Path, tmp_path: Path, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.faults = [Fault(method="POST", name=moment, what="slow", seconds=60)]
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(source), URL])
    deadline = time.monotonic() + 60
    while fake.faults[0].times:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    fake.faults = []
    assert "0/commit_success.txt" not in names(fake)
    journaled = sum(".ferry/journal-0/" in name for name in names(fake))
    result = to_cloud(source, reporter=Reporter())
    assert "a run holds a lease in gs://bucket/models/qwen/.ferry: watching" in capsys.readouterr().err
    assert not result.already and result.pieces_skipped >= journaled > 0
    assert_the_same(fake, beside, tmp_path)


def test_a_run_that_is_alive_is_left_alone(fake: FakeCloudStorage, source: Path, tmp_path: Path) -> None:
    with exclusively(maxtext_staging(URL)):
        with pytest.raises(OutsideFailure, match=r"another run is at work in gs://bucket/models/qwen/.ferry"):
            to_cloud(source)
        with pytest.raises(OutsideFailure, match="is at work"):
            to_cloud(source, part="0/2")
    to_cloud(source, part="0/2")


def test_another_checkpoint_is_not_overwritten(fake: FakeCloudStorage, source: Path) -> None:
    to_cloud(source)
    before = names(fake)
    with pytest.raises(BadInput, match=f"{URL}/0 exists already, from another run; it differs in target scan_layers"):
        to_cloud(source, Target(scan_layers=False))
    assert names(fake) == before
    to_cloud(source, Target(scan_layers=False), overwrite=True)
    assert_whole(fake)


def assert_whole(fake: FakeCloudStorage) -> None:
    assert "0/commit_success.txt" in names(fake) and not [n for n in names(fake) if n.startswith(".ferry")]


def test_what_is_somebody_elses_stays(fake: FakeCloudStorage, source: Path) -> None:
    fake.put("bucket", ROOT + "notes.txt", b"mine")
    with pytest.raises(BadInput, match=f"{URL} holds something else: notes.txt"):
        to_cloud(source, overwrite=True)
    assert names(fake) == ["notes.txt"]
    fake.objects.clear()
    fake.put("bucket", ROOT + "0/items/_METADATA", b"{}")
    with pytest.raises(BadInput, match="exists already and was not written by ferry"):
        to_cloud(source)
    assert fake.read("bucket", ROOT + "0/items/_METADATA") == b"{}"


def test_an_abandoned_run_is_cleaned_away(fake: FakeCloudStorage, source: Path) -> None:
    to_cloud(source, part="0/2")
    result = ferry_here("clean", URL, "--json")
    assert json.loads(result.stdout)["removed"] == [f"{URL}/.ferry"]
    assert names(fake) == []
    to_cloud(source)
    before = names(fake)
    assert json.loads(ferry_here("clean", URL, "--json").stdout)["removed"] == []
    assert names(fake) == before


def test_what_the_bucket_refuses(fake: FakeCloudStorage, source: Path) -> None:
    for url, message in (
        ("gs://elsewhere/x", "no bucket elsewhere"),
        ("gs:///x", "expected gs://bucket/prefix"),
        ("gs://bucket/" + "x" * 1100, "Cloud Storage allows names of up to 1024 bytes"),
    ):
        result = ferry_here("convert", source, url)
        assert result.returncode == 2 and message in result.stderr, result
        assert len(result.stderr.strip().splitlines()) == 1
    fake.denied = {"storage.objects.create"}
    result = ferry_here("convert", source, URL)
    assert result.returncode == 2 and "the credentials do not allow it (HTTP 403)" in result.stderr
    assert names(fake) == []


def test_from_the_hub_shard_by_shard(
    fake: FakeCloudStorage, source: Path, beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the source nor the result ever lies here as a whole."""
    monkeypatch.setenv("FERRY_CACHE", str(tmp_path / "cache"))
    with LocalHub({"acme/qwen": source}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        done = ferry_here("convert", "acme/qwen", URL, "--stream-download", "--memory-budget", "64MiB")
    assert done.returncode == 0, done.stderr
    assert_the_same(fake, beside, tmp_path / "copy")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
