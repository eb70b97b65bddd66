"""Comparing checkpoints leaf by leaf."""

from __future__ import annotations

import math

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from conversion_lib.conversions.compare import compare, opened_checkpoint, read_boxes
from conversion_lib.core.boxes import box_shape, slices
from conversion_lib.errors import BadInput


def write(directory, **tensors):
    directory.mkdir()
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def test_the_same(tmp_path):
    array = np.array([1.0, np.nan, -0.0], np.float32)
    result = compare(write(tmp_path / "a", x=array), write(tmp_path / "b", x=array))
    assert result.same
    assert (result.leaves, result.bytes_compared) == (1, 12)


def test_every_kind_of_difference(tmp_path):
    shared = {"bits": np.array([0.0, 1, 2], np.float32), "shape": np.zeros((2, 3)), "dtype": np.zeros(2, np.float32)}
    other = {"bits": np.array([-0.0, 1, 3], np.float32), "shape": np.zeros((3, 2)), "dtype": np.zeros(2, np.float64)}
    a = write(tmp_path / "a", **shared, mine=np.zeros(1))
    b = write(tmp_path / "b", **other, yours=np.zeros(1))
    found = {(d.path, d.what): d.detail for d in compare(a, b).differences}
    assert set(found) == {
        ("bits", "bits"), ("shape", "shape"), ("dtype", "dtype"), ("mine", "only in A"), ("yours", "only in B")
    }  # fmt: skip
    assert found[("bits", "bits")] == "2 of 3 elements"  # minus zero is another bit pattern


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(BadInput, match="neither"), opened_checkpoint(tmp_path):
        pytest.fail("it holds nothing")


@given(st.lists(st.integers(1, 9), max_size=4).map(tuple), st.integers(1, 200))
def test_read_boxes_tile_the_array_within_the_limit(shape, limit):
    count = np.zeros(shape, int)
    for box in read_boxes(shape, 4, limit):
        count[slices(box)] += 1
        assert math.prod(box_shape(box)) * 4 <= max(limit, 4)
    assert (count == 1).all()
