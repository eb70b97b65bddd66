"""Publishing to a directory and to Cloud Storage (the real client against the fake), and verifying."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conversion_lib import destinations
from conversion_lib.destinations import base, cloud_storage, directory
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.manifest import checkpoint_digest
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.publish import PublishResult, publish, verify
from conversion_lib.record import CheckpointRecord, Origin, Target
from tests.fakes.cloud_storage import FakeCloudStorage, Fault

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLACE = f"tiny/{COMMIT}/scanned-bf16-ocdbt-zarr3-maxtext0.2.5"
STEP = {
    "0/_CHECKPOINT_METADATA": b"{}",
    "0/commit_success.txt": b"done",
    "0/items/_METADATA": b"{}",
    "0/items/d/large": bytes(range(256)) * 40_000,  # more than the client sends in one request
    "0/items/d/empty": b"",
    "0/items/manifest.ocdbt": b"manifest",
}
OTHERS = {"hf/config.json": b"{}", "hf/tokenizer/x.json": b"[]", "report/report.html": b"<html>"}


def make_checkpoint(root: Path, *, salt: bytes = b"", commit: str | None = COMMIT, passed: bool = True) -> Path:
    for name, content in {**STEP, **OTHERS, "0/items/d/salt": salt}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    record = CheckpointRecord(
        ferry_version="0.1.0",
        fingerprint="sha256:" + "ab" * 32,
        identity={},
        family="llama3",
        model_name="tiny",
        origin=Origin(path="/somewhere", repo="acme/tiny", commit=commit),
        target=Target(),
        arrays=3,
        bytes_in=1,
        bytes_out=1,
        exact=True,
    )
    (root / "ferry.json").write_text(record.model_dump_json())
    if passed:
        write_verdict(root)
    return root


def write_verdict(root: Path, **changes: Any) -> None:
    verdict = {"verdict": "pass", "digest": checkpoint_digest(root), "max_kl": 1e-4, "layers": [], **changes}
    (root / "report" / "check.json").write_text(json.dumps(verdict))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCloudStorage]:
    with FakeCloudStorage(["bucket"]) as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.endpoint)
        monkeypatch.setattr(cloud_storage, "BEAT_SECONDS", 0.1)
        monkeypatch.setattr(cloud_storage, "DEAD_SECONDS", 1.0)
        monkeypatch.setattr(cloud_storage, "POLL_SECONDS", 0.05)
        yield running


@pytest.fixture(params=["directory", "file", "gs"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "gs":
        request.getfixturevalue("fake")
        return "gs://bucket/models"
    return f"file://{tmp_path}/out" if request.param == "file" else str(tmp_path / "out")


def read(url: str, path: str) -> bytes | None:
    return destinations.open_destination(url).read(path)


def names(url: str) -> list[str]:
    return [entry.path for entry in destinations.open_destination(url).entries(SILENT)]


def test_everything_lies_where_the_layout_says(checkpoint: Path, url: str) -> None:
    result = publish(checkpoint / "0" / "items", url)
    location = f"{url.removeprefix('file://')}/{PLACE}"
    assert (result.url, result.marker) == (location, f"{location}/ferry_commit.json")
    assert (result.digest, result.checked) == (checkpoint_digest(checkpoint), True)
    expected = {*STEP, *OTHERS, "0/items/d/salt", "report/check.json"}
    assert set(names(location)) == expected | {"provenance.json", "manifest.json", "ferry_commit.json"}
    assert all(read(location, name) == (checkpoint / name).read_bytes() for name in expected)
    assert names(url) == [f"{PLACE}/{name}" for name in names(location)] + ["tiny/latest.json"]
    assert (result.files, result.bytes) == (len(expected) + 1, result.bytes_copied)

    manifest = json.loads(read(location, "manifest.json") or b"")
    assert (manifest["digest"], manifest["checked"]) == (result.digest, True)
    assert {entry["path"] for entry in manifest["files"]} == expected | {"provenance.json"}
    provenance = json.loads(read(location, "provenance.json") or b"")
    assert provenance["record"]["origin"]["commit"] == COMMIT
    assert provenance["verdict"]["max_kl"] == 1e-4
    latest = json.loads(read(url, "tiny/latest.json") or b"")
    assert latest["location"] == PLACE.partition("/")[2] and latest["digest"] == result.digest
    verified = verify(location)
    assert (verified.problems, verified.digest) == ([], result.digest)


def test_again_does_nothing(checkpoint: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = publish(checkpoint, url)
    marker, latest = read(first.url, "ferry_commit.json"), read(url, "tiny/latest.json")
    again = publish(checkpoint, url, reporter=Reporter())
    assert again.bytes_copied == 0 and again.url == first.url
    assert f"{first.digest} is already published at {first.url}" in capsys.readouterr().err
    assert (read(first.url, "ferry_commit.json"), read(url, "tiny/latest.json")) == (marker, latest)


def test_another_checkpoint_there(checkpoint: Path, url: str, tmp_path: Path) -> None:
    first = publish(checkpoint, url)
    other = make_checkpoint(tmp_path / "other", salt=b"other")
    with pytest.raises(BadInput) as caught:
        publish(other, url)
    assert first.digest in str(caught.value) and checkpoint_digest(other) in str(caught.value)
    assert verify(first.url).problems == []


def test_local_weights_go_by_the_fingerprint(tmp_path: Path) -> None:
    local = make_checkpoint(tmp_path / "local", commit=None)
    assert "/tiny/local-abababababab/" in publish(local, str(tmp_path / "out")).url


def test_latest_follows_the_newest_and_is_mended(checkpoint: Path, url: str, tmp_path: Path) -> None:
    publish(checkpoint, url)
    newer = publish(make_checkpoint(tmp_path / "newer", commit="f" * 40), url)
    assert json.loads(read(url, "tiny/latest.json") or b"")["digest"] == newer.digest
    publish(checkpoint, url)  # the older one, already there: the pointer stays
    pointer = json.loads(read(url, "tiny/latest.json") or b"")
    assert pointer["location"].startswith("f" * 40)
    # a run that was killed between the marker and the pointer leaves an old one
    old = {**pointer, "published": "2020-01-01T00:00:00.000000+00:00", "location": "gone/gone"}
    destinations.open_destination(url).update("tiny/latest.json", lambda _: json.dumps(old).encode())
    publish(make_checkpoint(tmp_path / "newer", commit="f" * 40), url)
    assert json.loads(read(url, "tiny/latest.json") or b"") == pointer


def test_no_verdict_no_publishing(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refused(match: str) -> None:
        with pytest.raises(BadInput, match=match) as caught:
            publish(checkpoint, str(out))
        assert "ferry check" in str(caught.value) and "--unchecked" in str(caught.value)
        assert not out.exists()

    write_verdict(checkpoint, verdict="fail", max_kl=0.5)
    refused(r"did not pass its check \(verdict fail, max KL 0.5\)")
    write_verdict(checkpoint, digest="sha256:00")
    refused("is about another checkpoint")
    (checkpoint / "report" / "check.json").unlink()
    refused("has not been checked")
    (checkpoint / "report" / "check.json").write_text("{}")
    with pytest.raises(BadInput, match=r"check\.json is no verdict: verdict Field required"):
        publish(checkpoint, str(out))


def test_unchecked_says_so_and_leaves_a_foreign_report_behind(checkpoint: Path, url: str) -> None:
    write_verdict(checkpoint, digest="sha256:00")
    result = publish(checkpoint, url, unchecked=True)
    assert not result.checked
    assert json.loads(read(result.url, "manifest.json") or b"")["checked"] is False
    assert json.loads(read(result.url, "provenance.json") or b"")["verdict"] is None
    assert not any(name.startswith("report/") for name in names(result.url))
    assert verify(result.url).problems == []


def test_a_report_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    shutil.move(checkpoint / "report", tmp_path / "elsewhere")
    result = publish(checkpoint, str(tmp_path / "out"), report=tmp_path / "elsewhere")
    assert result.checked and (Path(result.url) / "report" / "report.html").exists()


def test_what_cannot_be_published(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="expected gs://bucket/prefix"):
        publish(checkpoint, "s3://bucket")
    occupied = tmp_path / "out" / PLACE
    occupied.mkdir(parents=True)
    (occupied / "mine").write_text("mine")
    with pytest.raises(BadInput, match="holds something that is no published checkpoint"):
        publish(checkpoint, str(tmp_path / "out"))
    assert [path.name for path in occupied.iterdir()] == ["mine"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="cannot write to"):
        publish(checkpoint, str(tmp_path / "file"))
    (checkpoint / "ferry.json").unlink()
    with pytest.raises(BadInput, match=r"no ferry\.json"):
        publish(checkpoint, str(tmp_path / "out"))
    with pytest.raises(BadInput, match=r"no ferry\.json"):
        publish(tmp_path / "nothing", str(tmp_path / "out"))


def test_an_uncommitted_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "0" / "commit_success.txt").unlink()
    with pytest.raises(BadInput, match="is not committed"):
        publish(checkpoint, str(tmp_path / "out"), unchecked=True)


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_destination_without_permission(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(BadInput, match=r"cannot write to .*Permission denied"):
        publish(checkpoint, str(tmp_path / "out"))


def test_a_read_only_file_system(checkpoint: Path) -> None:
    with pytest.raises(BadInput, match="cannot write to /sys"):
        publish(checkpoint, "/sys/models")


def test_a_disk_too_small(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(BadInput, match=r"needs 10\.2 MB, and 1\.0 kB are free"):
        publish(checkpoint, str(tmp_path / "out"))


def test_a_file_that_changes_meanwhile(checkpoint: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = base.Item.open

    def changed(item: base.Item) -> Any:
        if item.entry.path == "0/items/_METADATA":
            (checkpoint / "0" / "items" / "_METADATA").write_bytes(b"[]")
        return original(item)

    monkeypatch.setattr(base.Item, "open", changed)
    with pytest.raises(OutsideFailure, match="0/items/_METADATA changed while it was published"):
        publish(checkpoint, url)
    assert read(f"{url}/{PLACE}", "ferry_commit.json") is None


def killed_publisher(checkpoint: Path, url: str, at: str) -> None:
    """A publisher in its own process that kills itself when it comes to the file `at`."""
    code = f"""
import os, pathlib, signal
from conversion_lib import publish
from conversion_lib.destinations import base
original = base.Item.open
def dies(item):
    if item.entry.path == {at!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(item)
base.Item.open = dies
publish.publish(pathlib.Path({str(checkpoint)!r}), {url!r}, threads=1)
"""
    process = subprocess.run([sys.executable, "-c", code], env=os.environ.copy(), capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


def test_killed_and_run_again(checkpoint: Path, url: str) -> None:
    location = f"{url}/{PLACE}"
    killed_publisher(checkpoint, url, "hf/config.json")
    assert read(location, "ferry_commit.json") is None
    assert read(location, "0/commit_success.txt") is None
    result = publish(checkpoint, url)
    large = len(STEP["0/items/d/large"])
    assert result.bytes_copied <= result.bytes - large
    assert verify(result.url).problems == []
    assert not [name for name in names(url) if "ferry-" in name]


def test_killed_and_then_something_else(checkpoint: Path, url: str, tmp_path: Path) -> None:
    killed_publisher(checkpoint, url, "hf/config.json")
    other = make_checkpoint(tmp_path / "other", salt=b"other")
    (other / "0" / "items" / "d" / "large").write_bytes(b"small")
    (other / "0" / "items" / "d" / "empty").unlink()
    write_verdict(other)
    result = publish(other, url)
    assert verify(result.url).problems == []
    assert read(result.url, "0/items/d/large") == b"small"
    assert "0/items/d/empty" not in names(result.url)


def at_once(*runs: Callable[[], PublishResult]) -> tuple[list[PublishResult], list[Exception]]:
    results: list[PublishResult] = []
    failures: list[Exception] = []

    def attempt(run: Callable[[], PublishResult]) -> None:
        try:
            results.append(run())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=attempt, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, failures


def test_two_at_once(checkpoint: Path, url: str) -> None:
    results, failures = at_once(*[lambda: publish(checkpoint, url)] * 3)
    assert not failures
    assert sorted(result.bytes_copied > 0 for result in results) == [False, False, True]
    assert verify(results[0].url).problems == []
    assert not [name for name in names(url) if "claim" in name or "lock" in name]


def test_two_different_ones_at_once_do_not_mix(checkpoint: Path, url: str, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", salt=b"other")
    (other / "0" / "items" / "_METADATA").write_bytes(b"[1]")
    write_verdict(other)
    results, failures = at_once(lambda: publish(checkpoint, url), lambda: publish(other, url))
    assert len(results) == len(failures) == 1
    assert isinstance(failures[0], BadInput) and f"holds {results[0].digest}" in str(failures[0])
    verified = verify(results[0].url)
    assert (verified.problems, verified.digest) == ([], results[0].digest)


def test_cloud_claim_taken_over(checkpoint: Path, fake: FakeCloudStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that stood still so long that another took its place writes no marker."""
    original = cloud_storage.CloudStorageDestination.commit

    def late(self: cloud_storage.CloudStorageDestination, manifest: bytes, marker: bytes) -> None:
        fake.write("bucket", f"{PLACE}/.ferry_claim.json", b"another run", {}, {})
        original(self, manifest, marker)

    monkeypatch.setattr(cloud_storage.CloudStorageDestination, "commit", late)
    with pytest.raises(OutsideFailure, match=r"another run took gs://bucket/.* over"):
        publish(checkpoint, "gs://bucket")
    assert read(f"gs://bucket/{PLACE}", "ferry_commit.json") is None
    assert read(f"gs://bucket/{PLACE}", ".ferry_claim.json") == b"another run"


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


def test_cloud_order_and_preconditions(checkpoint: Path, fake: FakeCloudStorage) -> None:
    publish(checkpoint, "gs://bucket")
    written = [name.removeprefix(f"{PLACE}/") for name in fake.written()]
    assert written[-4:] == ["0/commit_success.txt", "manifest.json", "ferry_commit.json", "tiny/latest.json"]
    uploads = [path for method, path in fake.requests if method == "POST"]
    assert uploads and all("ifGenerationMatch=" in path for path in uploads)


def test_cloud_verify_sees_corruption(checkpoint: Path, fake: FakeCloudStorage) -> None:
    result = publish(checkpoint, "gs://bucket/models")
    name = f"models/{PLACE}/0/items/d/large"
    there = fake.objects["bucket", name]
    there.content = bytes(len(there.content))
    problems = verify(result.url).problems
    assert len(problems) == 1 and problems[0].startswith("0/items/d/large: crc32c")


def test_cloud_outages_are_survived(checkpoint: Path, fake: FakeCloudStorage) -> None:
    fake.faults = [
        Fault(503, "POST", "*/0/items/_METADATA"),
        Fault(503, "POST", "*/hf/config.json", applied=True),  # written, but the answer is lost
        Fault(503, "POST", "*/ferry_commit.json", applied=True),
        Fault(503, "PUT", "*/large"),
    ]
    result = publish(checkpoint, "gs://bucket/models")
    assert verify(result.url).problems == []
    assert all(fault.times == 0 for fault in fake.faults)


def test_cloud_bad_input(checkpoint: Path, fake: FakeCloudStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="no bucket nowhere"):
        publish(checkpoint, "gs://nowhere/models")
    with pytest.raises(BadInput, match="expected gs://bucket/prefix"):
        publish(checkpoint, "gs:///models")
    fake.forbidden = {"POST"}
    with pytest.raises(BadInput, match="credentials do not allow it"):
        publish(checkpoint, "gs://bucket/models")
    with pytest.raises(BadInput, match="no published checkpoint at"):
        verify("gs://bucket/models")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")
    with pytest.raises(BadInput, match="no credentials for gs://bucket"):
        publish(checkpoint, "gs://bucket/models")


def test_of_a_report_s_directory_only_the_report_is_published(checkpoint: Path, url: str) -> None:
    (checkpoint / "report" / "dequantized-abc").mkdir()
    (checkpoint / "report" / "dequantized-abc" / "model.safetensors").write_bytes(b"a whole model")
    (checkpoint / "report" / "notes.txt").write_text("mine")
    location = publish(checkpoint, url).url
    assert read(location, "report/check.json") is not None
    assert read(location, "report/notes.txt") is None
    assert read(location, "report/dequantized-abc/model.safetensors") is None


def test_a_check_that_comes_late_is_not_lost_in_silence(checkpoint: Path, url: str) -> None:
    publish(checkpoint, url, unchecked=True)
    assert publish(checkpoint, url, unchecked=True).bytes_copied == 0
    with pytest.raises(BadInput, match="was published without a check"):
        publish(checkpoint, url)


def test_what_a_check_passed_against_is_published(checkpoint: Path, url: str) -> None:
    path = checkpoint / "report" / "check.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "threshold": 0.5, "reference": "abc"}))
    provenance = json.loads(read(publish(checkpoint, url).url, "provenance.json") or b"")
    assert (provenance["verdict"]["threshold"], provenance["verdict"]["reference"]) == (0.5, "abc")
