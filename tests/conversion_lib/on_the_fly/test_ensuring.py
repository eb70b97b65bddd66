"""What a training run gets that has only a model's name, seen from one process that asks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from conversion_lib.conversions.convert import convert
from conversion_lib.demo.local_hub import LocalHub
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.on_the_fly import ensure_checkpoint
from conversion_lib.on_the_fly.ensuring import child_environment
from conversion_lib.on_the_fly.wanted import target_of
from conversion_lib.plan.chunking import SMALLEST
from conversion_lib.progress import SILENT
from conversion_lib.record import Target
from conversion_lib.sources.orbax import record_of
from tests.support.checkpoints import QWEN3, ferry_here, random_tensors, write_checkpoint
from tests.support.sparse_checkpoints import llama_tensors


class DType(StrEnum):
    """As in MaxText's configuration."""

    FLOAT32 = "float32"


FLAGS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny", QWEN3, random_tensors(llama_tensors(QWEN3)))


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    served = shutil.copytree(source, tmp_path / "repo")
    with LocalHub({"acme/tiny": served, "Qwen/Qwen3-0.6B": served}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("FERRY_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


def ensure(model: str | Path, out: Path, **settings: Any) -> Path:
    return ensure_checkpoint(model, out, reporter=SILENT, **settings)


def use_other_repo(hub: LocalHub, source: Path, directory: Path, seed: int) -> None:
    """Another commit of the repository, with other weights."""
    write_checkpoint(directory, QWEN3, random_tensors(llama_tensors(QWEN3), seed))
    with LocalHub({"acme/tiny": directory}) as other:
        hub.repos["acme/tiny"] = other.repos["acme/tiny"]


@pytest.mark.parametrize(("ocdbt", "zarr3"), FLAGS)
def test_both_storage_flags_are_forwarded(source: Path, tmp_path: Path, ocdbt: bool, zarr3: bool) -> None:
    settings = {"checkpoint_storage_use_ocdbt": ocdbt, "checkpoint_storage_use_zarr3": zarr3}
    items = ensure(source, tmp_path / "out", **settings)
    assert items == tmp_path / "out" / "0" / "items"
    said = json.loads((items / "_METADATA").read_text())
    assert (said["use_ocdbt"], said["use_zarr3"]) == (ocdbt, zarr3)
    convert(source, tmp_path / "other", Target(ocdbt=ocdbt, zarr3=zarr3))
    assert ferry_here("compare", tmp_path / "out", tmp_path / "other").returncode == 0


def test_layers_and_dtype_are_forwarded(source: Path, tmp_path: Path) -> None:
    ensure(source, tmp_path, scan_layers=False, dtype="float32")
    record = record_of(tmp_path)
    assert record is not None
    assert (record.target.scan_layers, record.target.save_dtype) == (False, "float32")


@pytest.mark.parametrize("dtype", [np.float32, np.dtype("float32"), DType.FLOAT32, ml_dtypes.bfloat16])
def test_a_dtype_as_the_run_has_it(dtype: Any) -> None:
    assert target_of(dtype).save_dtype == ("bfloat16" if dtype is ml_dtypes.bfloat16 else "float32")


def test_what_is_there_is_taken_as_it_is(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ensure(source, tmp_path)
    monkeypatch.setattr("sys.executable", "/no/python")  # nothing may be started
    assert ensure(source, tmp_path) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "ferry.json", "hf"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scan_layers": False}, "scan_layers: True there, False here"),
        ({"dtype": "float32"}, "dtype: bfloat16 there, float32 here"),
        ({"checkpoint_storage_use_ocdbt": False}, "checkpoint_storage_use_ocdbt: True there, False here"),
        ({"checkpoint_storage_use_zarr3": False}, "checkpoint_storage_use_zarr3: True there, False here"),
        ({"maxtext": "main"}, "maxtext: 0.2.5 there, main here"),
    ],
)
def test_another_setting_is_named(source: Path, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    convert(source, tmp_path, Target())
    with pytest.raises(BadInput, match="reconvert=True") as refused:
        ensure(source, tmp_path, **settings)
    assert said in str(refused.value) and str(refused.value).count("there,") == 1


def test_reconvert_replaces_what_differs_and_nothing_else(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path, Target())
    before = (tmp_path / "ferry.json").stat().st_mtime_ns
    ensure(source, tmp_path, reconvert=True)
    assert (tmp_path / "ferry.json").stat().st_mtime_ns == before
    ensure(source, tmp_path, scan_layers=False, reconvert=True)
    record = record_of(tmp_path)
    assert record is not None and not record.target.scan_layers


def test_another_source_is_named(source: Path, tmp_path: Path) -> None:
    copy = write_checkpoint(tmp_path / "copy", QWEN3, random_tensors(llama_tensors(QWEN3), seed=1))
    convert(source, tmp_path / "out", Target())
    with pytest.raises(BadInput, match=f"source: other files, of {source} there, {copy} here"):
        ensure(copy, tmp_path / "out")


def test_a_source_that_is_gone_is_not_missed(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", Target())
    (tmp_path / "gone").mkdir()
    assert ensure(tmp_path / "gone", tmp_path / "out")


def test_a_name_is_its_repository(hub: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ensure_checkpoint("qwen3-0.6b", tmp_path / "out")
    record = record_of(tmp_path / "out")
    assert record is not None
    assert (record.model_name, record.origin.repo) == ("qwen3-0.6b", "Qwen/Qwen3-0.6B")
    assert record.origin.commit == hub.repos["Qwen/Qwen3-0.6B"].commit
    assert "convert: " in capsys.readouterr().err, "the conversion's messages reach the parent's standard error"


def test_another_commit_is_named(hub: LocalHub, source: Path, tmp_path: Path) -> None:
    ensure("acme/tiny", tmp_path / "out")
    old = hub.repos["acme/tiny"].commit
    use_other_repo(hub, source, tmp_path / "newer", seed=1)
    new = hub.repos["acme/tiny"].commit
    with pytest.raises(BadInput, match=f"commit: {old} there, {new} here"):
        ensure("acme/tiny", tmp_path / "out")
    assert ensure("acme/tiny", tmp_path / "out", revision=old), "a commit that is given needs no Hub"
    ensure("acme/tiny", tmp_path / "out", reconvert=True)
    record = record_of(tmp_path / "out")
    assert record is not None and record.origin.commit == new


def test_without_a_hub_what_is_there_is_taken(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ensure("acme/tiny", tmp_path / "out")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert ensure_checkpoint("acme/tiny", tmp_path / "out")
    assert f"using the existing checkpoint of {hub.repos['acme/tiny'].commit}" in capsys.readouterr().err


def test_a_gated_repository(hub: LocalHub, tmp_path: Path) -> None:
    hub.faults.gated["acme/tiny"] = "hf_secret"
    with pytest.raises(BadInput, match="acme/tiny is gated") as refused:
        ensure("acme/tiny", tmp_path / "out")
    assert "exit code 2" in str(refused.value) and "\n" not in str(refused.value)
    assert ensure("acme/tiny", tmp_path / "out", token="hf_secret")
    assert b"hf_secret" not in b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_a_run_has_its_output_in_the_same_directory(source: Path, tmp_path: Path) -> None:
    (tmp_path / "run1" / "checkpoints" / "100").mkdir(parents=True)
    ensure(source, tmp_path)
    assert ensure(source, tmp_path, scan_layers=False, reconvert=True)
    assert (tmp_path / "run1" / "checkpoints" / "100").is_dir()


def foreign(out: Path, source: Path, target: Target) -> None:
    """A checkpoint as somebody else's converter leaves it."""
    convert(source, out, target)
    shutil.rmtree(out / "hf")
    (out / "ferry.json").unlink()


def test_a_checkpoint_of_maxtext_is_taken_where_it_fits(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign(tmp_path, source, Target(scan_layers=False))
    assert ensure_checkpoint(source, tmp_path, scan_layers=False)
    assert "was not written by ferry" in capsys.readouterr().err
    with pytest.raises(BadInput, match=r"scan_layers: False there, True here; dtype: bfloat16 there, float32 here"):
        ensure(source, tmp_path, dtype="float32")
    with pytest.raises(BadInput, match="was not written by ferry and is kept"):
        ensure(source, tmp_path, reconvert=True)
    assert (tmp_path / "0" / "items" / "_METADATA").exists()


def test_a_checkpoint_that_is_just_being_replaced_is_waited_for(source: Path, tmp_path: Path) -> None:
    """A commit takes the record of what it replaces away first."""
    foreign(tmp_path, source, Target())
    (tmp_path / ".ferry" / "replaced").mkdir(parents=True)
    with pytest.raises(OutsideFailure, match="was not committed within"):
        ensure(source, tmp_path, may_convert=False, wait_seconds=0.1)


def test_a_step_without_items_is_no_half_written_checkpoint(source: Path, tmp_path: Path) -> None:
    """It may be a directory of the run's own: a conversion would be in its way, and says so."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "notes").write_text("the run's own")
    with pytest.raises(OutsideFailure, match="was not committed within"):
        ensure(source, tmp_path, may_convert=False, wait_seconds=0.1)
    with pytest.raises(BadInput, match="was not written by ferry and is kept"):
        ensure(source, tmp_path)


def test_a_half_written_checkpoint_is_none(source: Path, tmp_path: Path) -> None:
    foreign(tmp_path, source, Target())
    for mark in tmp_path.rglob("commit_success.txt"):
        mark.unlink()
    with pytest.raises(BadInput, match=r"items was half-written by another program"):
        ensure(source, tmp_path)


def test_an_unfinished_run_of_something_else(source: Path, tmp_path: Path) -> None:
    """It may be somebody's hours of work: it goes where that is asked for."""
    work = tmp_path / ".ferry"
    (work / "0").mkdir(parents=True)
    (work / "run.json").write_text(json.dumps({"identity": {"source": "another"}, "chunk_limit": 1, "chunks": [1]}))
    with pytest.raises(BadInput, match=r"unfinished run.* instead of --overwrite, give reconvert=True"):
        ensure(source, tmp_path)
    assert ensure(source, tmp_path, reconvert=True)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_another_file_system(source: Path, tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm") / f"ferry-test-{os.getpid()}"
    elsewhere.mkdir()
    try:
        if elsewhere.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("the temporary directory is there too")
        (tmp_path / "0").symlink_to(elsewhere)
        with pytest.raises(BadInput, match=r"0 is on another file system than"):
            ensure(source, tmp_path)
    finally:
        shutil.rmtree(elsewhere)


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        ("qwen3-vl-2b", {}, "MaxText knows this name, but ferry has no conversion for it"),
        ("qwen3-0.7b", {}, "the nearest are qwen3-"),
        ("/no/such/directory", {}, "/no/such/directory is not a directory"),
        ("qwen3-0.6b", {"param_scan_axis": 0}, "param_scan_axis=0: ferry stacks layers on axis 1"),
        ("qwen3-0.6b", {"dtype": "float8_e4m3fn"}, "dtype=float8_e4m3fn: MaxText can save it, ferry cannot"),
        ("qwen3-0.6b", {"dtype": 16}, "dtype=16: input should be 'bfloat16' or 'float32'"),
        ("qwen3-0.6b", {"scan_layers": "maybe"}, "scan_layers=maybe: input should be a valid boolean"),
        ("qwen3-0.6b", {"checkpoint_storage_use_zarr3": None}, "checkpoint_storage_use_zarr3=None: input should be"),
        ("qwen3-0.6b", {"maxtext": "0.3"}, "maxtext=0.3: input should be '0.2.5' or 'main'"),
    ],
)
def test_bad_settings_are_refused_at_once(
    model: str, settings: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/no/python")
    with pytest.raises(BadInput) as refused:
        ensure(model, tmp_path / "out", **settings)
    assert said in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_made(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"cannot write to .*file/out.*give another directory"):
        ensure(source, tmp_path / "file" / "out")


def test_a_limit_to_waiting(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OutsideFailure, match=r"not committed within 0 s\. Check that all hosts share"):
        ensure(source, tmp_path, may_convert=False, wait_seconds=0.2)


def test_the_conversion_sees_nothing_of_the_parents_accelerators() -> None:
    parents = {
        "JAX_PLATFORMS": "proxy",
        "JAX_BACKEND_TARGET": "grpc://pathways-head:29000",
        "XLA_FLAGS": "--xla_tpu_x=1",
        "LIBTPU_INIT_ARGS": "--a",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_WORKER_ID": "3",
        "MEGASCALE_NUM_SLICES": "2",
        "ENABLE_PATHWAYS_PERSISTENCE": "1",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "M_SCAN_LAYERS": "false",
    }
    kept = {"HF_ENDPOINT": "http://hub", "HF_TOKEN": "a", "PATH": "/bin", "TMPDIR": "/scratch", "HTTPS_PROXY": "p:1"}
    seen = child_environment(parents | kept, token=None)
    assert seen == kept | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    assert child_environment(kept, token="b")["HF_TOKEN"] == "b"


def test_chunks_fit_more_shards(tmp_path: Path) -> None:
    """An array that is large enough is cut into as many shards as are asked for."""
    from conversion_lib.plan.chunking import chunk_shape

    rows = 64 * 16
    wide = SMALLEST // 16 // 2
    assert chunk_shape((rows, wide), 2, 1 << 30)[0] == rows // 16
    assert chunk_shape((rows, wide), 2, 1 << 30, shards=64)[0] == rows // 64
    assert chunk_shape((rows, wide), 2, 1 << 30, shards=1)[0] == rows
    assert chunk_shape((12 * 16, wide), 2, 1 << 30, shards=12)[0] == 16
