"""Checkpoints of both kinds as sources in a bucket: what reads them there reads what it does in a directory."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conversion_lib.conversions.compare import compare
from conversion_lib.conversions.convert import convert
from conversion_lib.conversions.dequantize import dequantize
from conversion_lib.conversions.export import export
from conversion_lib.engine import executor as engine
from conversion_lib.errors import BadInput
from conversion_lib.logits.check import _write_report
from conversion_lib.publish.publish import publish
from conversion_lib.record import CheckpointRecord, Target
from conversion_lib.sources import cloud
from conversion_lib.sources.orbax import record_of
from conversion_lib.storage import gcs as place
from conversion_lib.storage.locations import location
from tests.support.buckets import ROOT, URL, WHOLE, assert_the_same, upload
from tests.support.checkpoints import DEEPSEEK_V3, ferry_here, random_tensors, write_checkpoint
from tests.support.fakes.cloud_storage import Chance, FakeCloudStorage, Fault
from tests.support.sparse_checkpoints import deepseek_tensors
from tests.support.tiny_models import make_tiny

UNSCANNED = Target(scan_layers=False)


@pytest.fixture
def uploaded(fake: FakeCloudStorage, source: Path) -> str:
    return upload(fake, source, "hf/qwen")


@pytest.fixture
def staged(fake: FakeCloudStorage, beside: Path) -> str:
    return upload(fake, beside, "staging/qwen")


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
    with cloud.in_bucket(uploaded, 64 << 20) as files:
        fake.put("bucket", f"hf/qwen/{shard.name}", shard.read_bytes())
        with pytest.raises(BadInput, match=f"hf/qwen/{shard.name} changed while it was read"):
            convert(files, tmp_path / "out", Target(), options=WHOLE)
    assert not (tmp_path / "out" / "0").exists()


def test_no_checkpoint_there(fake: FakeCloudStorage, tmp_path: Path) -> None:
    for arguments, message in (
        (("gs://bucket/none",), "gs://bucket/none has no safetensors files"),
        (("gs://elsewhere/none",), "no bucket elsewhere"),
        (("gs://bucket/none", "--stream-download"), "the option is for a Hub id"),
    ):
        result = ferry_here("convert", arguments[0], tmp_path / "out", *arguments[1:])
        assert result.returncode == 2 and message in result.stderr, result


def test_a_quantized_checkpoint_is_dequantized_from_there(fake: FakeCloudStorage, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", DEEPSEEK_V3, random_tensors(deepseek_tensors(DEEPSEEK_V3)))
    dequantize(source, tmp_path / "here", options=WHOLE)
    done = ferry_here("dequantize", upload(fake, source, "hf/fp8"), tmp_path / "there", "--memory-budget", "64MiB")
    assert done.returncode == 0, done.stderr
    assert compare(tmp_path / "here", tmp_path / "there").same


# a MaxText checkpoint


@pytest.mark.parametrize("path", ["", "/", "/0", "/0/items"])
def test_every_name_of_it_will_do(fake: FakeCloudStorage, staged: str, beside: Path, path: str) -> None:
    found = ferry_here("inspect", staged + path, "--json")
    assert found.returncode == 0, found.stderr
    there, here = json.loads(found.stdout), json.loads(ferry_here("inspect", beside, "--json").stdout)
    assert [there[key] for key in ("kind", "leaves", "metadata")] == [
        here[key] for key in ("kind", "leaves", "metadata")
    ]


@pytest.mark.parametrize("target", [Target(), Target(ocdbt=False, zarr3=False)], ids=lambda target: target.slug)
def test_it_is_exported_from_there(fake: FakeCloudStorage, source: Path, tmp_path: Path, target: Target) -> None:
    convert(source, tmp_path / "made", target, options=WHOLE)
    url = upload(fake, tmp_path / "made", "trained")
    fake.chance = Chance(0.1, seed=5)
    done = ferry_here("export", url, tmp_path / "back", "--memory-budget", "64MiB")
    assert done.returncode == 0, done.stderr
    assert compare(source, tmp_path / "back").same
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_it_is_laid_out_anew_from_bucket_to_bucket(
    fake: FakeCloudStorage, staged: str, beside: Path, source: Path, tmp_path: Path
) -> None:
    planned = ferry_here("plan", staged, "--no-scan-layers", "--json")
    assert planned.returncode == 0, planned.stderr
    done = ferry_here("convert", staged, URL, "--no-scan-layers", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fingerprint"] == json.loads(planned.stdout)["fingerprint"]
    convert(source, tmp_path / "unscanned", UNSCANNED, options=WHOLE)
    assert compare(URL, tmp_path / "unscanned").same
    assert json.loads(ferry_here("convert", staged, URL, "--no-scan-layers", "--json").stdout)["already"]


def test_without_a_record_it_is_named_by_where_it_lies(
    fake: FakeCloudStorage, staged: str, source: Path, tmp_path: Path
) -> None:
    """As a training run leaves it: no ferry.json, no hf/."""
    for name in fake.names("bucket", "staging/qwen/"):
        if "/0/" not in name:
            del fake.objects["bucket", name]
    refused = ferry_here("export", staged, tmp_path / "back")
    assert refused.returncode == 2 and f"{staged}/hf has no config.json" in refused.stderr
    options = ("--hf-config", source, "--no-scan-layers", "--written-by", "0.2.5")
    assert ferry_here("convert", staged, tmp_path / "out", *options).returncode == 0
    assert json.loads((tmp_path / "out/ferry.json").read_bytes())["origin"]["path"] == staged


def test_two_are_compared_where_they_lie(
    fake: FakeCloudStorage, staged: str, uploaded: str, source: Path, beside: Path, tmp_path: Path
) -> None:
    assert ferry_here("compare", staged, beside).returncode == 0
    assert ferry_here("compare", uploaded, source).returncode == 0
    changed = bytearray((shard := sorted(source.glob("*.safetensors"))[0]).read_bytes())
    changed[-1] ^= 1
    fake.put("bucket", f"hf/qwen/{shard.name}", bytes(changed))
    different = ferry_here("compare", source, uploaded)
    assert different.returncode == 1 and "bits 1 of" in different.stdout
    unlike = ferry_here("compare", staged, uploaded)
    assert (
        unlike.returncode == 2 and f"{staged} is a maxtext checkpoint and {uploaded} a safetensors one" in unlike.stderr
    )


def test_one_that_changes_meanwhile_is_no_source(
    fake: FakeCloudStorage, staged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = engine.run

    def run(*arguments: object, **options: object) -> engine.Totals:
        totals = original(*arguments, **options)  # type: ignore[arg-type]
        fake.put("bucket", "staging/qwen/0/items/_METADATA", fake.read("bucket", "staging/qwen/0/items/_METADATA"))
        return totals

    monkeypatch.setattr(engine, "run", run)
    with pytest.raises(BadInput, match=f"{staged}/0/items/items changed while it was read"):
        export(staged, tmp_path / "back", options=WHOLE)
    assert not (tmp_path / "back").exists()


def test_what_is_no_checkpoint_is_said(fake: FakeCloudStorage, staged: str, tmp_path: Path) -> None:
    for step in ("0", "100"):
        fake.put("bucket", f"run/checkpoints/{step}/items/_METADATA", b"{}")
    for url, message in (
        ("gs://bucket/nothing", "gs://bucket/nothing has no Orbax checkpoint: no _METADATA in it"),
        ("gs://bucket/run/checkpoints", "steps 0, 100: name one, such as gs://bucket/run/checkpoints/100"),
        ("gs://elsewhere/x", "no bucket elsewhere"),
    ):
        refused = ferry_here("export", url, tmp_path / "back")
        assert refused.returncode == 2 and message in refused.stderr, refused
        assert len(refused.stderr.strip().splitlines()) == 1
    for name in fake.names("bucket", "staging/qwen/0/items/d/"):
        fake.put("bucket", name, b"not what it was")
    broken = ferry_here("export", staged, tmp_path / "back")
    assert broken.returncode == 2 and f"{staged}/0/items: metadata of arrays cannot be read" in broken.stderr
    assert "tensorstore_spec" not in broken.stderr


def test_an_outage_is_three(
    fake: FakeCloudStorage, staged: str, uploaded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"gcs_request_retries": {"max_retries": 2, "initial_delay": "5ms", "max_delay": "5ms"}}
    monkeypatch.setattr(place, "TENSORSTORE_REQUESTS", place.TENSORSTORE_REQUESTS | few)
    fake.faults = [
        Fault(503, "GET", pattern, times=10**6) for pattern in ("staging/qwen/0/items/d/*", "hf/qwen/model-*")
    ]
    for arguments in (("export", staged), ("convert", uploaded)):
        failed = ferry_here(*arguments, tmp_path / arguments[0])
        assert failed.returncode == 3 and "All 2 retry attempts failed" in failed.stderr, failed
        assert "http_response" not in failed.stderr


def test_a_report_that_cannot_be_kept_is_not_lost_silently(fake: FakeCloudStorage, staged: str) -> None:
    fake.denied = {"storage.objects.create"}
    result: Any = SimpleNamespace(model_dump_json=lambda indent: "{}")
    with pytest.raises(BadInput, match=r"do not allow it .*; the report is lost: use `--report DIR`"):
        _write_report(location(staged) / "report", b"page", result)


@pytest.mark.parametrize("arguments", [("export", "CKPT"), ("dequantize", "SRC"), ("download", "acme/tiny")])
def test_only_a_conversion_is_written_there(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = ferry_here(*arguments, URL)
    assert refused.returncode == 2 and f"{URL}: expected a directory" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_checked_and_published_without_leaving_the_bucket(fake: FakeCloudStorage, tmp_path: Path) -> None:
    model = make_tiny("qwen3", tmp_path / "hf")
    assert ferry_here("convert", model, URL).returncode == 0
    unchecked = ferry_here("publish", URL, "gs://bucket/shelf")
    assert unchecked.returncode == 2 and "ferry check" in unchecked.stderr
    checked = ferry_here("check", URL, "--reference", model, "--tokens", "32", "--json")
    assert checked.returncode == 0, checked.stderr
    answer = json.loads(checked.stdout)
    assert answer["report"] == f"{URL}/report/report.html"
    assert URL in fake.read("bucket", f"{ROOT}report/report.html").decode()
    assert json.loads(fake.read("bucket", f"{ROOT}report/check.json"))["digest"] == answer["digest"]
    assert json.loads(ferry_here("check", URL, "--reference", model, "--tokens", "32", "--json").stdout)["already"]
    published = publish(URL, "gs://bucket/shelf")
    assert published.checked and published.digest == answer["digest"]
    assert compare(URL, published.url).same
    assert ferry_here("export", published.url, tmp_path / "back").returncode == 0
    assert compare(model, tmp_path / "back").same
    assert ferry_here("convert", published.url, tmp_path / "flat", "--no-scan-layers").returncode == 0
    made, again = (
        CheckpointRecord.model_validate_json(fake.read("bucket", f"{ROOT}ferry.json")),
        record_of(tmp_path / "flat"),
    )
    assert again and (again.model_name, again.origin) == (made.model_name, made.origin)
    fake.put("bucket", f"{ROOT}0/items/_METADATA", fake.read("bucket", f"{ROOT}0/items/_METADATA") + b" ")
    other = ferry_here("publish", URL, "gs://bucket/elsewhere")
    assert other.returncode == 2 and "ferry check" in other.stderr
