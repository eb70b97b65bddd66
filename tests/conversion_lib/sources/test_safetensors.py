"""Reading safetensors: any box of any tensor, against the safetensors package's own reader."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conversion_lib.core.boxes import slices
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.sources import files
from conversion_lib.sources import safetensors as reader
from conversion_lib.sources.safetensors import SafetensorsSource


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("single")
    rng = np.random.default_rng(0)
    tensors = {
        "matrix": rng.standard_normal((37, 3000)).astype(np.float32),
        "cube": rng.standard_normal((5, 7, 11)).astype(np.float16),
        "vector": rng.standard_normal(13).astype(ml_dtypes.bfloat16),
        "scalar": np.array(4.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_box_of_any_tensor(directory, data):
    source = SafetensorsSource(directory)
    name = data.draw(st.sampled_from(["matrix", "cube", "vector"]))
    with safetensors.safe_open(directory / "model.safetensors", "np") as theirs:
        whole = theirs.get_tensor(name)
    spans = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in whole.shape]
    box = tuple((a, b) if a < b else (0, n) for (a, b), n in zip(spans, whole.shape, strict=True))
    np.testing.assert_array_equal(source.read(name, box), whole[slices(box)])


def test_a_scalar_and_a_whole_tensor(directory):
    source = SafetensorsSource(directory)
    assert source.read("scalar") == 4.5
    assert source.read("scalar").shape == ()
    assert source.read("matrix").shape == (37, 3000)
    assert source.read("empty").shape == (0, 3)


def test_few_columns_of_many_rows_are_read_row_by_row(directory, monkeypatch):
    """The two ways to read a part of each row give the same."""
    source = SafetensorsSource(directory)
    monkeypatch.setattr(reader, "COVER_BYTES", 30_000)
    whole = source.read("matrix")
    for columns in [(100, 400), (5, 2900)]:
        np.testing.assert_array_equal(source.read("matrix", ((3, 30), columns)), whole[3:30, slice(*columns)])


def write_shards(directory, shards: dict[str, dict], weight_map: dict[str, str]):
    for name, tensors in shards.items():
        safetensors.numpy.save_file(tensors, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_the_index_says_which_of_two_copies_counts(tmp_path):
    one, two = np.ones(2, np.float32), np.full(2, 2, np.float32)
    write_shards(
        tmp_path,
        {"a.safetensors": {"x": one, "y": one}, "b.safetensors": {"x": two}},
        {"x": "b.safetensors", "y": "a.safetensors"},
    )
    source = SafetensorsSource(tmp_path)
    assert source.read("x").tolist() == [2, 2]
    assert source.offset_of("x").file == "b.safetensors"


def test_an_index_that_names_a_missing_tensor(tmp_path):
    """Whether that does harm is for the family to say."""
    write_shards(
        tmp_path, {"a.safetensors": {"x": np.ones(2, np.float32)}}, {"x": "a.safetensors", "gone": "a.safetensors"}
    )
    source = SafetensorsSource(tmp_path)
    assert (list(source.tensors), source.absent, source.notes) == (["x"], {"gone": "a.safetensors"}, ())


def test_an_index_may_not_name_files_elsewhere(tmp_path):
    write_shards(tmp_path, {}, {"x": "../secret.safetensors"})
    with pytest.raises(BadInput, match=r"\.\./secret"):
        SafetensorsSource(tmp_path)


def test_an_index_that_names_the_wrong_shard(tmp_path):
    one = np.ones(2, np.float32)
    shards = {"a.safetensors": {"x": one}, "b.safetensors": {"y": one}}
    write_shards(tmp_path, shards, {"x": "a.safetensors", "y": "a.safetensors", "w": "b.safetensors"})
    with pytest.raises(BadInput, match=r"tensor y is in a\.safetensors, but it is in b\.safetensors"):
        SafetensorsSource(tmp_path)


def test_an_index_need_not_name_every_tensor(tmp_path):
    """As transformers has it, which reads all of each shard."""
    write_shards(
        tmp_path, {"a.safetensors": {"x": np.ones(2, np.float32), "y": np.ones(2, np.float32)}}, {"x": "a.safetensors"}
    )
    assert sorted(SafetensorsSource(tmp_path).tensors) == ["x", "y"]


def test_two_copies_of_which_the_index_has_none_are_refused(tmp_path):
    one = {"x": np.ones(2, np.float32)}
    shards = {"a.safetensors": one, "b.safetensors": one, "c.safetensors": {"y": one["x"]}}
    for index in ({}, {"x": "c.safetensors"}):
        write_shards(tmp_path, shards, {"1": "a.safetensors", "2": "b.safetensors", "y": "c.safetensors"} | index)
        with pytest.raises(BadInput, match=r"tensor x is in a\.safetensors and in b\.safetensors, and .* does not say"):
            SafetensorsSource(tmp_path)


def test_files_beside_the_weights_are_not_read_and_are_told(tmp_path):
    one = {"x": np.ones(2, np.float32)}
    safetensors.numpy.save_file(one, tmp_path / "model.safetensors")
    (tmp_path / "model.fp16.safetensors").write_bytes(b"no safetensors at all")
    (tmp_path / "._model.safetensors").write_bytes(b"what macOS leaves")
    source = SafetensorsSource(tmp_path)
    assert [shard.name for shard in source.shards] == ["model.safetensors"]
    assert source.notes == ("not read: model.fp16.safetensors; model.safetensors comes first, as in transformers",)


@pytest.mark.parametrize("keep", [0, 4, 20, 200])
def test_a_truncated_file(tmp_path, keep):
    safetensors.numpy.save_file({"x": np.ones(1000, np.float32)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(BadInput, match="truncated"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        [],
    ],
)
def test_a_header_that_is_wrong(tmp_path, entry):
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        SafetensorsSource(tmp_path)


def test_a_file_cut_short_while_it_is_read(directory, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((directory / "model.safetensors").read_bytes())
    source = SafetensorsSource(tmp_path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 10_000)
    with pytest.raises(OutsideFailure, match="tensor matrix"):
        source.read("matrix")


def test_a_directory_without_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match="only safetensors"):
        SafetensorsSource(tmp_path)


def test_more_files_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "OPEN_FILES", 2)
    shards = {f"{i}.safetensors": {f"x{i}": np.full(3, i, np.float32)} for i in range(5)}
    write_shards(tmp_path, shards, {f"x{i}": f"{i}.safetensors" for i in range(5)})
    source = SafetensorsSource(tmp_path)
    for _ in range(2):
        assert [source.read(f"x{i}")[0] for i in range(5)] == [0, 1, 2, 3, 4]
