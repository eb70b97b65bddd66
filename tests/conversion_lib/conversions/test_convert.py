"""Conversions of small models of every family, against MaxText's layout written down by hand (numpy alone)."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy

from conversion_lib.conversions.convert import convert
from conversion_lib.conversions.dequantize import dequantize
from conversion_lib.demo.tiny_checkpoint import make_tiny_deepseek_v3
from conversion_lib.engine import executor as engine
from conversion_lib.record import Target
from conversion_lib.runs.options import Options
from conversion_lib.sources.orbax import open_orbax, record_of
from tests.support.logit_models import CONFIGS, build_model
from tests.support.maxtext_by_hand import BF16, maxtext_leaves
from tests.support.orbax_reader import restore


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model's directory, built once for the module."""
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            built[name] = build_model(name, tmp_path_factory.mktemp(name))
        return built[name]

    return get


def leaves_of(checkpoint: Path) -> dict[str, np.ndarray]:
    source = open_orbax(checkpoint)
    return {path.removeprefix("params/params/"): source.read(path) for path in source.tensors if path != "step"}


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for path, array in expected.items():
        assert found[path].dtype == array.dtype, path
        assert found[path].shape == array.shape, path
        assert found[path].tobytes() == array.tobytes(), path


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_float32_leaves_of_every_family(model, tmp_path, name, scan_layers):
    convert(model(name), tmp_path / "out", Target(scan_layers=scan_layers, save_dtype="float32"))
    assert_same_bits(leaves_of(tmp_path / "out"), maxtext_leaves(model(name), scanned=scan_layers))


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v2", "deepseek_v3", "deepseek_v32"])
def test_bfloat16_leaves_are_the_source_s_bits(model, tmp_path, name):
    convert(model(name), tmp_path / "out", Target())
    assert_same_bits(leaves_of(tmp_path / "out"), maxtext_leaves(model(name), scanned=True, dtype=BF16))


def test_llama_s_query_is_rounded_once_more_in_bfloat16(model, tmp_path):
    convert(model("llama"), tmp_path / "out", Target())
    record = record_of(tmp_path / "out")
    assert record is not None
    assert not record.exact
    assert_same_bits(leaves_of(tmp_path / "out"), maxtext_leaves(model("llama"), scanned=True, dtype=BF16))


def test_the_bias_for_maxtext_main(model, tmp_path):
    convert(model("deepseek_v3"), tmp_path / "out", Target(maxtext="main", save_dtype="float32"))
    expected = maxtext_leaves(model("deepseek_v3"), scanned=True, bias_order="experts_first")
    assert_same_bits(leaves_of(tmp_path / "out"), expected)


@pytest.mark.parametrize("budget", [64 << 20, 1 << 30])
@pytest.mark.parametrize("chunk_bytes", [1 << 10, 64 << 20])
def test_chunks_and_budget_change_no_bit(model, tmp_path, budget, chunk_bytes):
    options = Options(memory_budget=budget, threads=3)
    convert(model("deepseek_v3"), tmp_path / "out", Target(chunk_bytes=chunk_bytes), options=options)
    assert_same_bits(leaves_of(tmp_path / "out"), maxtext_leaves(model("deepseek_v3"), scanned=True, dtype=BF16))


def dequantized_by_hand(directory: Path) -> dict[str, np.ndarray]:
    """bf16(float32(x) · float32(scale of its block)), read with the safetensors package."""
    tensors: dict[str, np.ndarray] = {}
    for file in directory.glob("*.safetensors"):
        for name, raw in safetensors.deserialize(file.read_bytes()):
            kind = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "BF16": BF16, "F32": np.float32}[raw["dtype"]]
            tensors[name] = np.frombuffer(raw["data"], kind).reshape(raw["shape"])
    plain = {}
    for name, array in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if array.dtype == ml_dtypes.float8_e4m3fn:
            rows, columns = (np.arange(n) // 128 for n in array.shape)
            scale = tensors[name + "_scale_inv"][rows[:, None], columns[None, :]]
            array = (array.astype(np.float32) * scale).astype(BF16)
        plain[name] = array
    return plain


def test_dequantize_writes_a_checkpoint_in_its_own_right(tmp_path):
    source = make_tiny_deepseek_v3(tmp_path / "fp8")
    dequantize(source, tmp_path / "bf16")
    expected, found, index = dequantized_by_hand(source), {}, {}
    for file in sorted((tmp_path / "bf16").glob("*.safetensors")):
        for name, raw in safetensors.deserialize(file.read_bytes()):
            found[name], index[name] = bytes(raw["data"]), file.name
    assert sorted(found) == sorted(expected)
    assert all(found[name] == array.tobytes() for name, array in expected.items())
    written = json.loads((tmp_path / "bf16/model.safetensors.index.json").read_text())
    assert written["weight_map"] == index
    assert written["metadata"]["total_size"] == sum(len(data) for data in found.values())
    config = json.loads((tmp_path / "bf16/config.json").read_text())
    assert "quantization_config" not in config
    original = json.loads((source / "config.json").read_text())
    assert config == {key: value for key, value in original.items() if key != "quantization_config"}
    for file in source.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name and file.name != "config.json":
            assert (tmp_path / "bf16" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("save_dtype", ["bfloat16", "float32"])
def test_fused_and_staged_give_the_same_bits(tmp_path, save_dtype):
    source = make_tiny_deepseek_v3(tmp_path / "fp8")
    dequantize(source, tmp_path / "bf16")
    convert(source, tmp_path / "fused", Target(save_dtype=save_dtype))
    convert(tmp_path / "bf16", tmp_path / "staged", Target(save_dtype=save_dtype))
    records = [record_of(tmp_path / name) for name in ("fused", "staged")]
    assert [record and (record.model_name, record.origin.path) for record in records] == [("fp8", str(source))] * 2
    assert_same_bits(leaves_of(tmp_path / "fused"), leaves_of(tmp_path / "staged"))


def test_orbax_s_own_manager_restores_what_was_written(model, tmp_path):
    convert(model("qwen3"), tmp_path / "out", Target())
    with ocp.CheckpointManager(tmp_path / "out", item_names=("items",)) as manager:
        assert manager.latest_step() == 0
    assert_same_bits(restore(tmp_path / "out/0/items"), maxtext_leaves(model("qwen3"), scanned=True, dtype=BF16))


def test_files_that_a_user_needs_are_beside_the_checkpoint(tmp_path):
    source = make_tiny_deepseek_v3(tmp_path / "fp8")
    convert(source, tmp_path / "out", Target())
    carried = {path.name for path in (tmp_path / "out/hf").iterdir()}
    assert carried == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("ocdbt", [True, False])
@pytest.mark.parametrize("name", ["pct%41x", "hash#x", "que?x", "a space and ümlaut"])
def test_a_destination_of_any_name(model, tmp_path, name, ocdbt):
    convert(model("qwen3"), tmp_path / name / "out", Target(ocdbt=ocdbt))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert_same_bits(leaves_of(tmp_path / name / "out"), maxtext_leaves(model("qwen3"), scanned=True, dtype=BF16))


def test_less_memory_on_the_next_try_goes_on(model, tmp_path, monkeypatch):
    """Chunks are cut as the first try cut them; a finished run is finished under any budget."""
    whole, made = engine.make, []

    def fails_late(plan, source, piece, out, band):
        made.append(piece)
        if len(made) > 5:
            raise OSError("out of memory, say")
        return whole(plan, source, piece, out, band)

    monkeypatch.setattr(engine, "make", fails_late)
    monkeypatch.setattr(engine, "GROUP_SECONDS", 0.0)
    with pytest.raises(OSError, match="out of memory"):
        convert(model("qwen3"), tmp_path / "out", Target(), options=Options(threads=1))
    monkeypatch.setattr(engine, "make", whole)
    small = Options(memory_budget=64 << 20, threads=1)
    assert convert(model("qwen3"), tmp_path / "out", Target(), options=small).pieces_skipped > 0
    assert convert(model("qwen3"), tmp_path / "out", Target(), options=small).already


def test_a_tensor_without_dimensions_and_an_empty_one_are_carried_along(tmp_path):
    source = make_tiny_deepseek_v3(tmp_path / "fp8")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    extra = {"odd.scalar": np.array(3.5, np.float32), "odd.empty": np.zeros((4, 0), np.float32)}
    safetensors.numpy.save_file(extra, source / "extra.safetensors")
    index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    dequantize(source, tmp_path / "bf16")
    found = safetensors.numpy.load_file(tmp_path / "bf16/extra.safetensors")
    assert found["odd.scalar"] == np.float32(3.5)
    assert found["odd.empty"].shape == (4, 0)


def test_a_finished_run_is_not_done_again(model, tmp_path, monkeypatch):
    first = convert(model("qwen3"), tmp_path / "out", Target())
    monkeypatch.setattr(engine, "run", lambda *a, **k: pytest.fail("ran again"))
    again = convert(model("qwen3"), tmp_path / "out", Target())
    assert (first.already, again.already) == (False, True)
    assert again.fingerprint == first.fingerprint


def test_a_failure_in_the_middle_is_gone_on_from(model, tmp_path, monkeypatch):
    """A worker fails after some pieces; the next run skips what was committed, and the bits are the same."""
    made, whole = 0, engine.make

    def fails_late(plan, source, piece, out, band):
        nonlocal made
        made += 1
        if made > 20:
            raise OSError("the disk is gone")
        return whole(plan, source, piece, out, band)

    target, options = Target(scan_layers=False), Options(threads=1)
    monkeypatch.setattr(engine, "make", fails_late)
    monkeypatch.setattr(engine, "GROUP_SECONDS", 0.0)
    with pytest.raises(OSError, match="the disk is gone"):
        convert(model("deepseek_v3"), tmp_path / "out", target, options=options)
    assert not (tmp_path / "out/0").exists()
    monkeypatch.setattr(engine, "make", whole)
    result = convert(model("deepseek_v3"), tmp_path / "out", target, options=options)
    assert 0 < result.pieces_skipped <= 20
    assert not (tmp_path / "out/.ferry").exists()
    assert not list((tmp_path / "out").rglob("*.__lock"))
    assert_same_bits(leaves_of(tmp_path / "out"), maxtext_leaves(model("deepseek_v3"), scanned=False, dtype=BF16))
