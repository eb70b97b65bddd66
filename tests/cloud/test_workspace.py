"""Conversions to gs:// with the real clients and the Cloud Storage of `tests/fakes`: bits, order, kills, faults."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conversion_lib.cloud import claim, client, place
from conversion_lib.compare import compare
from conversion_lib.convert import ConvertResult, Options, convert, layout_at
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.finalize import finalize
from conversion_lib.parts import Part
from conversion_lib.record import Target
from conversion_lib.sources import cloud
from conversion_lib.sources.orbax import open_orbax
from tests.checkpoints import QWEN3, ferry_here, random_tensors, write_checkpoint
from tests.fakes.cloud_storage import Chance, FakeCloudStorage, Fault
from tests.sparse_checkpoints import llama_tensors

URL = "gs://bucket/models/qwen"
ROOT = "models/qwen/"
STORAGES = [Target(ocdbt=ocdbt, zarr3=zarr3) for ocdbt in (True, False) for zarr3 in (True, False)]
WHOLE = Options(memory_budget=64 << 20, threads=2)
QUICK_RETRIES = {"gcs_request_retries": {"max_retries": 40, "initial_delay": "5ms", "max_delay": "50ms"}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    write_checkpoint(directory, QWEN3, random_tensors(llama_tensors(QWEN3)), shards=3)
    (directory / "tokenizer.json").write_text('{"made": "up"}')
    return directory


@pytest.fixture(scope="module")
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
        monkeypatch.setattr(claim, "BEAT_SECONDS", 0.5)
        monkeypatch.setattr(claim, "DEAD_SECONDS", 3.0)
        monkeypatch.setattr(claim, "POLL_SECONDS", 0.05)
        monkeypatch.setattr(client, "RETRY", client.RETRY.with_delay(initial=0.01, maximum=0.1))
        monkeypatch.setattr(place, "TENSORSTORE_REQUESTS", place.TENSORSTORE_REQUESTS | QUICK_RETRIES)
        yield running


def names(fake: FakeCloudStorage) -> list[str]:
    return [name.removeprefix(ROOT) for name in fake.names("bucket", ROOT)]


def to_cloud(
    source: Path, target: Target = Target(), *, part: str | None = None, overwrite: bool = False
) -> ConvertResult:
    options = Options(WHOLE.memory_budget, WHOLE.threads, overwrite, part=Part.parse(part) if part else None)
    return convert(source, URL, target, options=options)


def assert_the_same(fake: FakeCloudStorage, beside: Path, copy: Path) -> None:
    """Every leaf bit for bit, the files beside them, and nothing of the work."""
    for name in names(fake):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(fake.read("bucket", ROOT + name))
    comparison = compare(beside, copy)
    assert comparison.same and comparison.leaves == len(open_orbax(beside).tensors)
    assert not [name for name in names(fake) if name.startswith(".ferry")]
    assert (copy / "hf/tokenizer.json").read_bytes() == (beside / "hf/tokenizer.json").read_bytes()
    assert json.loads((copy / "ferry.json").read_bytes())["fingerprint"]


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
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.5)
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
from conversion_lib import engine
from conversion_lib.convert import Options, convert
from conversion_lib.record import Target
engine.GROUP_SECONDS = 0.0
convert(Path(sys.argv[1]), sys.argv[2], Target(), options=Options(64 << 20, 2))
"""


@pytest.mark.parametrize("moment", ["*journal-0/00000003.json", "*items/manifest.ocdbt", "*0/commit_success.txt"])
def test_a_killed_run_is_gone_on_with(
    fake: FakeCloudStorage, source: Path, beside: Path, tmp_path: Path, moment: str
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
    result = to_cloud(source)
    assert not result.already and result.pieces_skipped >= journaled > 0
    assert_the_same(fake, beside, tmp_path)


def test_a_run_that_is_alive_is_left_alone(fake: FakeCloudStorage, source: Path, tmp_path: Path) -> None:
    with layout_at(URL).exclusively():
        with pytest.raises(OutsideFailure, match=r"another run is at work in gs://bucket/models/qwen/.ferry"):
            to_cloud(source)
        with pytest.raises(OutsideFailure, match="is at work"):
            to_cloud(source, part="0/2")
    to_cloud(source, part="0/2")


def test_another_checkpoint_is_not_overwritten(fake: FakeCloudStorage, source: Path) -> None:
    to_cloud(source)
    before = names(fake)
    with pytest.raises(BadInput, match=f"{URL}/0 is there already, from another run; it differs in target scan_layers"):
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
    with pytest.raises(BadInput, match="is there already and was not written by ferry"):
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
        ("gs://bucket/" + "x" * 1100, "Cloud Storage takes names of 1024 bytes"),
    ):
        result = ferry_here("convert", source, url)
        assert result.returncode == 2 and message in result.stderr, result
        assert len(result.stderr.strip().splitlines()) == 1
    fake.denied = {"storage.objects.create"}
    result = ferry_here("convert", source, URL)
    assert result.returncode == 2 and "the credentials do not allow it (HTTP 403)" in result.stderr
    assert names(fake) == []


# from gs://


@pytest.fixture
def uploaded(fake: FakeCloudStorage, source: Path) -> str:
    for path in source.iterdir():
        fake.put("bucket", f"hf/qwen/{path.name}", path.read_bytes())
    return "gs://bucket/hf/qwen"


def test_weights_are_read_where_they_lie(
    fake: FakeCloudStorage, uploaded: str, beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud, "BLOCK_BYTES", 1000)  # so that tensors lie across blocks
    first = ferry_here("convert", uploaded, URL, "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(fake.read("bucket", ROOT + "ferry.json"))["origin"]["path"] == uploaded
    assert_the_same(fake, beside, tmp_path)
    assert json.loads(ferry_here("convert", uploaded, URL, "--json").stdout)["already"]
    planned = ferry_here("plan", uploaded, "--json")
    assert planned.returncode == 0 and json.loads(planned.stdout)["bytes_out"] > 0


def test_reading_under_faults(
    fake: FakeCloudStorage, uploaded: str, beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud, "BLOCK_BYTES", 1000)
    fake.chance = Chance(0.1, seed=3)
    assert ferry_here("convert", uploaded, tmp_path / "out", "--json").returncode == 0
    assert compare(beside, tmp_path / "out").same


def test_an_object_written_anew_is_not_mixed_in(
    fake: FakeCloudStorage, uploaded: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = sorted(source.glob("*.safetensors"))[-1]
    with cloud.in_bucket(uploaded, 64 << 20) as remote:
        fake.put("bucket", f"hf/qwen/{shard.name}", shard.read_bytes())
        with pytest.raises(BadInput, match=f"hf/qwen/{shard.name} changed while it was read"):
            convert(remote.headers, tmp_path / "out", Target(), options=WHOLE, remote=remote)
    assert not (tmp_path / "out" / "0").exists()


def test_no_checkpoint_there(fake: FakeCloudStorage, tmp_path: Path) -> None:
    for arguments, message in (
        (("gs://bucket/none",), "gs://bucket/none holds no safetensors"),
        (("gs://elsewhere/none",), "no bucket elsewhere"),
        (("gs://bucket/none", "--stream-download"), "the option is for a Hub id"),
    ):
        result = ferry_here("convert", arguments[0], tmp_path / "out", *arguments[1:])
        assert result.returncode == 2 and message in result.stderr, result
